"""Retrieval where scenes are damaged or nobody labelled them: neither may look like a result."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from csmae.__main__ import main
from csmae.config import Data
from csmae.encoders import SensorEncoder
from csmae.retrieval import nearest
from csmae.retrieval.query import Query, search
from csmae.retrieval.store import FeatureStore, Source, StoreError, open_store, write_store
from csmae.training.scoring import encoder_of, seeded_model
from csmae.training.snapshots import _retrieval
from tests.conftest import small_config
from tests.support.archives import names_of, open_folder, put, without_labels, write_pickles, write_v2

DAMAGED, MISSING = 3, 1
"""Pairs of the training split, of five."""


@pytest.fixture(scope="module")
def encoder() -> SensorEncoder:
    config = small_config()
    return encoder_of(seeded_model(config), config).eval()


@pytest.fixture(scope="module")
def encoder_dir(encoder: SensorEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save(folder)
    return folder


@pytest.fixture(params=["v1", "v2"])
def store(tmp_path: Path, encoder: SensorEncoder, request: pytest.FixtureRequest) -> FeatureStore:
    """Of an archive in which one pair is damaged and one is missing."""
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
    """Of a pair, in the store's archive."""
    return names_of(number)["_N9999_" not in store.names[0].decode()]


def unlike_all(store: FeatureStore, sensor: str) -> Query:
    """A query of which every real image is the opposite: damaged ones, alike to nothing, would come first."""
    mean_d = normalize(torch.cat(list(store.blocks(sensor))).sum(0), dim=0)
    return Query(sensor, -mean_d, np.zeros((4, 120, 120), np.float32), None)


def test_a_damaged_scene_is_never_retrieved_not_even_before_scenes_of_negative_similarity(store: FeatureStore) -> None:
    for sensor in ("s1", "s2"):
        found = {found.direction: found for found in search(unlike_all(store, sensor), store, 3)}[
            f"{sensor}_to_{sensor}"
        ]
        assert [store.names[place].decode() for place in sorted(found.places)] == [name_in(store, n) for n in (0, 2, 4)]
        assert max(found.cosines) < 0


def test_more_scenes_than_are_intact_cannot_be_asked_for(store: FeatureStore) -> None:
    with pytest.raises(StoreError, match=r"--k must be between 1 and the 3 intact scenes of .*: found 4"):
        list(search(unlike_all(store, "s1"), store, 4))


def test_a_store_made_with_damage_skipped_answers_queries_and_draws_them(
    store: FeatureStore, encoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = store.folder / "found.png"
    asked = ["retrieve", "--encoder", str(encoder_dir), "--store", str(store.folder), "--query", name_in(store, 0)]
    assert main([*asked, "--sensor", "s1", "--k", "3", "--output", str(picture)]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert name_in(store, DAMAGED) not in said and name_in(store, MISSING) not in said
    assert name_in(store, 2) in said and name_in(store, 4) in said
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_search_leaves_out_zero_features_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "GROUP", 8)
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
    few = nearest.search(-archive[1:2], [archive[:1], archive[1:3], torch.zeros(2, 8)], 4)
    assert sorted(few.indices_qk[0].tolist()) == [1, 2], "only two scenes are there"


def test_a_picture_of_retrieval_asks_with_an_intact_scene_and_shows_no_damaged_one(
    tmp_path: Path, encoder: SensorEncoder
) -> None:
    folder = write_v2(tmp_path)
    put(folder, {names_of(number)[2]: b"damaged!!" for number in (0, 3)})
    validation = open_folder(folder, on_error="skip").split("train")
    whole = open_folder(write_v2(tmp_path / "whole")).split("train")
    g = torch.Generator().manual_seed(0)
    features = {sensor: normalize(torch.randn(5, 8, generator=g), dim=1) for sensor in ("s1", "s2")}
    for found in features.values():
        found[[0, 3]] = 0
        found[[2, 4]] = -found[1]
    arrays = _retrieval(validation, features, 2)
    expected = whole.read([1, 2, 4])
    assert np.array_equal(arrays["query_s1"], expected.s1[0].numpy().astype(np.float16))
    assert {hit.tobytes() for hit in arrays["hits_s1_to_s1"]} == {
        image.numpy().astype(np.float16).tobytes() for image in expected.s1[1:]
    }


@pytest.mark.parametrize("splits", [("validation", "test"), ("validation",)])
def test_an_archive_without_labels_is_evaluated_without_them(
    tmp_path: Path, encoder_dir: Path, capsys: pytest.CaptureFixture[str], splits: tuple[str, ...]
) -> None:
    folder = without_labels(write_v2(tmp_path), splits)
    assert main(["evaluate", str(folder), "--encoder", str(encoder_dir), "--k", "2"]) == 0
    said = capsys.readouterr().out
    assert f"no labels in the split {splits[0]}" in said.replace("splits", "split"), said
    assert "F1 cannot be computed" in said and "finding each test scene's image from the other sensor" in said
    assert "recall@1" in said and "mrr" in said
    assert "f1" not in said and "Urban fabric" not in said


def test_scenes_without_labels_among_labelled_ones_are_counted(
    tmp_path: Path, encoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_v2(tmp_path)
    without_labels(folder, names=(names_of(6)[0],))
    assert main(["evaluate", str(folder), "--encoder", str(encoder_dir), "--k", "2"]) == 0
    said = capsys.readouterr().out
    assert "1 of 3 queries and 0 of 2 test scenes carry no label: they count as not found" in said, said
    assert "f1" in said
