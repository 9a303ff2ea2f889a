"""Feature stores, queries and the published protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csmae.cli.main import main
from csmae.config import Data
from csmae.data.archive import open_archive
from csmae.data.errors import ArchiveError
from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from csmae.retrieval import store as store_module
from csmae.retrieval.embed import embed
from csmae.retrieval.geotiff import GeoTiffError, read_scene
from csmae.retrieval.protocol import evaluate
from csmae.retrieval.query import read_query, search
from csmae.retrieval.scores import rank_directions
from csmae.retrieval.store import Source, StoreError, open_store, write_store
from csmae.sensors import CLASSES, DIRECTIONS, S2_BANDS
from csmae.training.scoring import final_scores
from tests.conftest import small_config
from tests.support.archives import put
from tests.support.geotiffs import s1_image, write_geotiff

SHARD = 10
NUM_SCENES = 24
"""Scenes of the validation split: two full shards and a part of one."""


def ignore(steps: int) -> None:
    """Progress that no one watches."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """An archive in a folder."""
    folder = tmp_path_factory.mktemp("archives") / "archive"
    assert main(["data", "synthesize", str(folder), "--size", "96"]) == 0
    return Data(path=str(folder))


@pytest.fixture
def source(data: Data, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr(store_module, "SHARD", SHARD)
    monkeypatch.setattr(store_module, "SHARDS_PER_BLOCK", 2)
    return Source(data, "validation", ("s1", "s2"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_a_store_holds_the_features_of_the_split(
    source: Source, encoder: SensorEncoder, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    assert write_store(tmp_path / "store", encoder, source, dtype, ignore) == 0
    store, split = open_store(tmp_path / "store"), source.open()
    expected = embed(encoder, split, 7)
    for sensor in ("s1", "s2"):
        torch.testing.assert_close(torch.cat(list(store.blocks(sensor))), expected[sensor], atol=tolerance, rtol=0)
    assert [name.decode() for name in store.names] == split.names
    assert (store.labels_nc == split.labels()).all()
    assert np.load(tmp_path / "store" / "s1-00000.npy").dtype == dtype


def test_a_killed_embedding_resumes_at_its_next_shard(source: Source, encoder: SensorEncoder, tmp_path: Path) -> None:
    class KillError(Exception):
        pass

    def kill(steps: int) -> None:
        if (tmp_path / "s2-00000.npy").exists():
            raise KillError

    with pytest.raises(KillError):
        write_store(tmp_path, encoder, source, "float16", kill)
    with pytest.raises(StoreError, match=r"is not complete: 4 of 6 shards are missing, s1-00001\.npy first"):
        open_store(tmp_path)
    first = (tmp_path / "s1-00000.npy").stat().st_mtime_ns
    steps: list[int] = []
    write_store(tmp_path, encoder, source, "float16", steps.append)
    assert sum(steps) == NUM_SCENES
    assert (tmp_path / "s1-00000.npy").stat().st_mtime_ns == first
    assert len(open_store(tmp_path).names) == NUM_SCENES
    assert not list(tmp_path.glob(".*"))


def test_another_store_or_folder_is_not_overwritten(source: Source, encoder: SensorEncoder, tmp_path: Path) -> None:
    write_store(tmp_path / "store", encoder, source, "float16", ignore)
    with pytest.raises(StoreError, match=r"was made with another dtype \(float16, not float32\): choose a new folder"):
        write_store(tmp_path / "store", encoder, source, "float32", ignore)
    other_config = small_config(train__seed=1)
    other = SensorEncoder.from_model(build_model(other_config), other_config).eval()
    with pytest.raises(StoreError, match="was made with another encoder"):
        write_store(tmp_path / "store", other, source, "float16", ignore)
    with pytest.raises(StoreError, match="was made with another split"):
        write_store(tmp_path / "store", encoder, Source(source.data, "test", source.sensors), "float16", ignore)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="is neither empty nor a feature store"):
        write_store(tmp_path / "mine", encoder, source, "float16", ignore)
    with pytest.raises(StoreError, match="was made with another encoder: embed the archive with this one"):
        read_query("any", "s1", open_store(tmp_path / "store"), other)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("s2-00001.npy", b"\x93NUMPY", "is damaged: delete it and embed again"),
        ("s2-00001.npy", None, "1 of 6 shards are missing"),
        ("names.npy", None, "No such file or directory"),
        ("store.json", b"{}", "is not a csmae-features-1"),
        ("store.json", None, "create a store with `csmae embed`"),
    ],
)
def test_a_damaged_store_is_rejected(
    source: Source, encoder: SensorEncoder, tmp_path: Path, name: str, content: bytes | None, text: str
) -> None:
    write_store(tmp_path, encoder, source, "float16", ignore)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=text):
        open_store(tmp_path)


def test_an_archive_of_one_sensor_has_a_store_of_one_sensor(
    source: Source, encoder: SensorEncoder, tmp_path: Path
) -> None:
    write_store(tmp_path, encoder, Source(source.data, "validation", ("s2",)), "float32", ignore)
    store = open_store(tmp_path)
    expected = embed(encoder, source.open(), 7)["s2"]
    torch.testing.assert_close(torch.cat(list(store.blocks("s2"))), expected)
    query = read_query(source.open().names[3], "s1", store, encoder)
    assert [ranked.direction for ranked in search(query, store, 4)] == ["s1_to_s2"]


def test_a_scene_of_the_archive_retrieves_itself_first_and_its_neighbours_in_order(
    source: Source, encoder: SensorEncoder, tmp_path: Path
) -> None:
    write_store(tmp_path, encoder, source, "float32", ignore)
    store = open_store(tmp_path)
    query = read_query(source.open().names[13], "s2", store, encoder)
    to_s1, to_s2 = search(query, store, 5)
    assert to_s2.indices[0] == 13
    assert math.isclose(to_s2.similarities[0], 1, abs_tol=1e-5)
    similarity = torch.cat(list(store.blocks("s1"))) @ query.feature_d
    assert to_s1.indices == similarity.argsort(descending=True)[:5].tolist()
    assert query.labels_c is not None
    assert (query.labels_c == source.open().labels()[13]).all()


def test_a_query_may_be_of_another_split_and_an_unknown_name_is_rejected(
    source: Source, encoder: SensorEncoder, tmp_path: Path
) -> None:
    write_store(tmp_path, encoder, source, "float32", ignore)
    store = open_store(tmp_path)
    name = Source(source.data, "train", ("s1", "s2")).open().names[0]
    assert read_query(name, "s1", store, encoder).image.shape == (2, 120, 120)
    with pytest.raises(ValueError, match=r"--query: 1 of 1 names are not in metadata\.parquet: S2A_MSIL2A_none"):
        read_query("S2A_MSIL2A_none", "s1", store, encoder)
    with pytest.raises(StoreError, match="--k must be between 1 and the 24 scenes"):
        list(search(read_query(name, "s1", store, encoder), store, 25))


def test_embed_retrieve_and_evaluate_by_command(
    data: Data, encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, encoder = str(tmp_path / "store"), ["--encoder", str(encoder_dir)]
    assert main(["embed", data.path, store, *encoder]) == 0
    name = open_archive(data).split("test").names[2]
    picture = tmp_path / "found.png"
    command = ["retrieve", *encoder, "--store", store, "--query", name, "--sensor", "s1", "--k", "3"]
    assert main([*command, "--output", str(picture)]) == 0
    output = capsys.readouterr().out
    assert output.count(name) >= 1
    assert "s1_to_s1" in output
    assert "s1_to_s2" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--output", str(tmp_path / "none.xyz")]) == 2
    assert main(["evaluate", data.path, *encoder, "--k", "4"]) == 0
    output = capsys.readouterr().out
    assert f"{data.path}: 24 validation queries, 24 test scenes, k = 4" in output
    assert "Urban fabric" in output
    assert main(["evaluate", data.path, *encoder, "--k", "25"]) == 2
    assert capsys.readouterr().err == "k must be between 1 and the 24 intact scenes of the test split: found 25\n"


def test_the_final_scores_of_a_search_are_those_of_evaluate(
    data: Data, encoder: SensorEncoder, encoder_dir: Path
) -> None:
    result = evaluate(encoder, open_archive(data), 4)
    expected = final_scores(small_config(data__path=data.path, eval__k=4), encoder_dir)
    assert {f"test/{name}": value for name, value in result.scores.items()} == pytest.approx(expected)


def test_hit_rates_count_hits_that_have_the_class(data: Data, encoder: SensorEncoder) -> None:
    archive = open_archive(data)
    result = evaluate(encoder, archive, 3)
    queries, gallery = (archive.split(name) for name in ("validation", "test"))
    rankings = rank_directions(embed(encoder, queries, 16), embed(encoder, gallery, 16), 3)
    ranked = rankings["s1_to_s2"].tolist()
    index = int(queries.labels().sum(0).argmax())
    with_class = np.flatnonzero(queries.labels()[:, index])
    hits = [gallery.labels()[hit, index] for query in with_class for hit in ranked[query]]
    row = result.classes[index]
    assert row.name == CLASSES[index]
    assert row.num_queries == len(with_class)
    assert row.hit_rates[DIRECTIONS.index("s1_to_s2")] == pytest.approx(np.mean(hits))


def test_damaged_scenes_are_an_error_or_left_out(
    encoder: SensorEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "archive"
    assert main(["data", "synthesize", str(folder), "--size", "48"]) == 0
    whole = open_archive(Data(path=str(folder)))
    names = whole.split("test").names
    expected = evaluate(encoder, whole, 3)
    put(folder, {names[4]: bytes(1000)}, map_size=1 << 30)
    with pytest.raises(ArchiveError, match=names[4]):
        evaluate(encoder, open_archive(Data(path=str(folder))), 3)
    skipping = Data(path=str(folder), on_error="skip")
    result = evaluate(encoder, open_archive(skipping), 3)
    assert (result.num_queries, result.num_archive) == (expected.num_queries, expected.num_archive - 1)
    assert write_store(tmp_path / "store", encoder, Source(skipping, "test", ("s1", "s2")), "float32", ignore) == 1
    features = torch.cat(list(open_store(tmp_path / "store").blocks("s2")))
    assert features.norm(dim=1).round().tolist() == [float(row != 4) for row in range(len(names))]


Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes a GeoTIFF; its defaults describe a valid S1 scene."""
    pytest.importorskip("rasterio", reason="GeoTIFFs are an extra")
    return partial(write_geotiff, tmp_path / "scene.tif")


def test_a_geotiff_retrieves_the_scene_that_it_was_cut_from(
    source: Source, encoder: SensorEncoder, tmp_path: Path, write: Writer
) -> None:
    write_store(tmp_path / "store", encoder, source, "float32", ignore)
    store, split = open_store(tmp_path / "store"), source.open()
    path = write(split.read([5]).s1[0].numpy())
    query = read_query(str(path), "s1", store, encoder)
    assert next(iter(search(query, store, 3))).indices[0] == 5
    assert query.labels_c is None


def test_bands_with_descriptions_are_found_by_name(write: Writer) -> None:
    order = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    pixels = np.arange(100, 112, dtype=np.uint16)[:, None, None] * np.ones((12, 120, 120), np.uint16)
    scene = read_scene(write(pixels, names=order), "s2")
    assert scene[:, 0, 0].tolist() == [100 + order.index(name) for name in S2_BANDS]


@pytest.mark.parametrize(
    ("pixels", "options", "text"),
    [
        (s1_image(side=100), {}, "must be 120 × 120 pixels, found 100 × 100"),
        (s1_image(bands=3), {}, "s1 must have 2 bands, VH VV: found 3"),
        (s1_image(), {"names": ("VV", "HH")}, "s1 needs the bands VH VV: VH missing among VV HH"),
        (
            s1_image(),
            {"crs": "EPSG:4326", "size": 1e-4},
            "must be in a projection in meters such as UTM, found EPSG:4326",
        ),
        (s1_image(), {"crs": None}, "must be in a projection in meters such as UTM, found none"),
        (s1_image(), {"size": 20}, "pixels must be 10 m wide, found 20 × 20 m"),
        (10 ** (s1_image() / 10), {}, "s1 must be backscatter in dB"),
        (np.full_like(s1_image(), -9999), {"nodata": -9999}, "14400 pixels hold no data"),
    ],
)
def test_an_invalid_scene_is_rejected_with_one_line(
    write: Writer, pixels: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(GeoTiffError, match=text) as failure:
        read_scene(write(pixels, **options), "s1")
    assert "\n" not in str(failure.value)


def test_reflectance_between_0_and_1_is_rejected(write: Writer) -> None:
    with pytest.raises(GeoTiffError, match=r"s2 must be reflectance times 10,000, found 0\.3 to 0\.3"):
        read_scene(write(np.full((10, 120, 120), 0.3, np.float32)), "s2")


def test_a_file_that_is_not_a_geotiff_is_rejected(tmp_path: Path) -> None:
    pytest.importorskip("rasterio", reason="GeoTIFFs are an extra")
    (tmp_path / "scene.tif").write_text("not a picture")
    with pytest.raises(GeoTiffError, match="cannot be read as a GeoTIFF"):
        read_scene(tmp_path / "scene.tif", "s1")


def test_store_json_describes_the_source(source: Source, encoder: SensorEncoder, tmp_path: Path) -> None:
    write_store(tmp_path, encoder, source, "float16", ignore)
    metadata = json.loads((tmp_path / "store.json").read_text())
    assert metadata["encoder"] == encoder.fingerprint()
    assert metadata["path"] == source.data.path
    assert (metadata["split"], metadata["num_scenes"], metadata["dtype"]) == ("validation", NUM_SCENES, "float16")
