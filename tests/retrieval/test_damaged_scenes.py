"""Retrieval with damaged scenes and without labels: neither may look like a valid result."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from csmae.cli.main import main
from csmae.config import Data
from csmae.encoders import SensorEncoder
from csmae.retrieval import nearest, quantized
from csmae.retrieval.query import Query, search
from csmae.retrieval.store import FeatureStore, Source, StoreError, open_store, write_store
from csmae.training.snapshots import _retrieval
from tests.support.archives import names_of, open_folder, put, without_labels, write_pickles, write_v2

DAMAGED, MISSING = 3, 1
"""Two of the training split's five pairs."""


@pytest.fixture(params=["v1", "v2"])
def store(tmp_path: Path, encoder: SensorEncoder, request: pytest.FixtureRequest) -> FeatureStore:
    """A store of an archive in which one pair is damaged and one is missing."""
    folder = (write_v2 if request.param == "v2" else write_pickles)(tmp_path / "archive")
    damaged, missing = (names_of(number)[2 if request.param == "v2" else 1] for number in (DAMAGED, MISSING))
    put(folder, {damaged: b"damaged!!"})
    with (
        lmdb.open(str(next(folder.glob("*.lmdb"))), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.delete(missing.encode())
    source = Source(Data(path=str(folder), on_error="skip"), "train", ("s1", "s2"))
    assert write_store(tmp_path / "store", encoder, source, "float32", lambda steps: None) == 1
    return open_store(tmp_path / "store")


def name_in(store: FeatureStore, number: int) -> str:
    """Name of a pair in the store's archive."""
    return names_of(number)["_N9999_" not in store.names[0].decode()]


def opposite_query(store: FeatureStore, sensor: str) -> Query:
    """A query with a negative similarity to every intact scene: the zeros of damaged scenes would rank first."""
    mean_d = normalize(torch.cat(list(store.blocks(sensor))).sum(0), dim=0)
    return Query(sensor, -mean_d, np.zeros((4, 120, 120), np.float32), None)


def test_a_damaged_scene_is_not_retrieved_even_if_all_others_have_negative_similarity(store: FeatureStore) -> None:
    for sensor in ("s1", "s2"):
        by_direction = {ranked.direction: ranked for ranked in search(opposite_query(store, sensor), store, 3)}
        ranked = by_direction[f"{sensor}_to_{sensor}"]
        names = [store.names[index].decode() for index in sorted(ranked.indices)]
        assert names == [name_in(store, number) for number in (0, 2, 4)]
        assert max(ranked.similarities) < 0


def test_retrieving_more_scenes_than_are_intact_is_rejected(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"--k must be between 1 and the 3 intact scenes of .*: found 4"):
        list(search(opposite_query(store, "s1"), store, 4))


def test_retrieve_prints_and_draws_hits_from_a_store_that_skipped_damage(
    store: FeatureStore, encoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = store.folder / "found.png"
    command = ["retrieve", "--encoder", str(encoder_dir), "--store", str(store.folder), "--query", name_in(store, 0)]
    assert main([*command, "--sensor", "s1", "--k", "3", "--output", str(picture)]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert name_in(store, DAMAGED) not in output and name_in(store, MISSING) not in output
    assert name_in(store, 2) in output and name_in(store, 4) in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_search_skips_zero_features_at_any_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "GROUP", 8)
    g = torch.Generator().manual_seed(0)
    queries, archive = (normalize(torch.randn(n, 8, generator=g), dim=1) for n in (200, 3000))
    archive = normalize(archive - 3 * queries.mean(0), dim=1)
    zero = [0, 5, 999, 1000, 2500, 2999]
    archive[zero] = 0
    similarity = queries @ archive.T
    similarity[:, zero] = -torch.inf
    hits = nearest.search(queries, archive.split(1000), 5)
    expected = similarity.topk(5)
    torch.testing.assert_close(hits.scores_qk, expected.values)
    torch.testing.assert_close(similarity.gather(1, hits.indices_qk), expected.values)
    hits = nearest.search(-archive[1:2], [archive[:1], archive[1:3], torch.zeros(2, 8)], 4)
    assert sorted(hits.indices_qk[0].tolist()) == [1, 2], "only two scenes are intact"


def test_a_snapshot_queries_with_an_intact_scene_and_contains_no_damaged_one(
    tmp_path: Path, encoder: SensorEncoder
) -> None:
    folder = write_v2(tmp_path)
    put(folder, {names_of(number)[2]: b"damaged!!" for number in (0, 3)})
    validation = open_folder(folder, on_error="skip").split("train")
    whole = open_folder(write_v2(tmp_path / "whole")).split("train")
    g = torch.Generator().manual_seed(0)
    features = {sensor: normalize(torch.randn(5, 8, generator=g), dim=1) for sensor in ("s1", "s2")}
    for features_nd in features.values():
        features_nd[[0, 3]] = 0
        features_nd[[2, 4]] = -features_nd[1]
    arrays = _retrieval(validation, features, 2)
    expected = whole.read([1, 2, 4])
    assert np.array_equal(arrays["query_s1"], expected.s1[0].numpy().astype(np.float16))
    assert {hit.tobytes() for hit in arrays["hits_s1_to_s1"]} == {
        image.numpy().astype(np.float16).tobytes() for image in expected.s1[1:]
    }


@pytest.mark.parametrize("splits", [("validation", "test"), ("validation",)])
def test_evaluate_prints_partner_scores_for_an_archive_without_labels(
    tmp_path: Path, encoder_dir: Path, capsys: pytest.CaptureFixture[str], splits: tuple[str, ...]
) -> None:
    folder = without_labels(write_v2(tmp_path), splits)
    assert main(["evaluate", str(folder), "--encoder", str(encoder_dir), "--k", "2"]) == 0
    output = capsys.readouterr().out
    assert f"no labels in the split {splits[0]}" in output.replace("splits", "split"), output
    assert "F1 cannot be computed" in output and "finding each test scene's image from the other sensor" in output
    assert "recall@1" in output and "mrr" in output
    assert "f1" not in output and "Urban fabric" not in output


def test_evaluate_counts_scenes_without_labels(
    tmp_path: Path, encoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_v2(tmp_path)
    without_labels(folder, names=(names_of(6)[0],))
    assert main(["evaluate", str(folder), "--encoder", str(encoder_dir), "--k", "2"]) == 0
    output = capsys.readouterr().out
    assert "1 of 3 queries and 0 of 2 test scenes carry no label: they count as not found" in output, output
    assert "f1" in output
