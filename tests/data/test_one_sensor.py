"""Archives with only one sensor, and archives whose bands have another type."""

import logging
from pathlib import Path

import lmdb
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save

from csmae.cli.main import main
from csmae.data.errors import ArchiveError
from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from csmae.sensors import S1_BANDS, S2_BANDS
from tests.conftest import small_config
from tests.support.archives import (
    FILES,
    bands_of,
    labels_of,
    names_of,
    open_folder,
    put,
    splits_of,
    write_pickles,
    write_v2,
)
from tests.support.v1_pickles import pickled, write_v1


def one_sensor_v2(folder: Path, sensor: str) -> Path:
    write_v2(folder)
    with (
        lmdb.open(str(folder / "archive.lmdb"), map_size=1 << 26) as environment,
        environment.begin(write=True) as transaction,
    ):
        keys = [key for key, _ in transaction.cursor()]
        for key in keys:
            if not key.lower().startswith(sensor.encode()):
                transaction.delete(key)
    return folder


def one_sensor_v1(folder: Path, sensor: str) -> Path:
    lists: dict[str, list[str]] = {file: [] for file in FILES.values()}
    patches = {}
    for number, split in enumerate(splits_of()):
        name = names_of(number).v1
        bands = {key: band for key, band in bands_of(number).items() if (key[0] == "V") == (sensor == "s1")}
        patches[name] = pickled(bands, labels_of(number))
        lists[FILES[split]].append(name)
    write_v1(folder, patches, lists)
    return folder


@pytest.fixture(
    params=[(w, s) for w in (one_sensor_v2, one_sensor_v1) for s in ("s1", "s2")],
    ids=lambda case: f"{case[0].__name__}-{case[1]}",
)
def single(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """An intact archive of one sensor, and the sensor."""
    write, sensor = request.param
    return write(tmp_path / "archive", sensor), sensor


def test_check_accepts_an_intact_archive_of_one_sensor(
    single: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sensor = single
    code = main(["data", "check", str(folder)])
    text = capsys.readouterr().out
    assert code == 0, text
    assert f", {sensor} only, " in text and text.endswith(": 0 problems\n")


def test_stats_and_show_take_one_sensor(single: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, sensor = single
    assert main(["data", "stats", str(folder), "--sensor", sensor]) == 0
    found = yaml.safe_load(capsys.readouterr().out)["data"]
    assert found.keys() == {f"{sensor}_mean", f"{sensor}_std"}
    names = S1_BANDS if sensor == "s1" else S2_BANDS
    pixels = [np.stack([bands_of(number)[name] for number in range(5)]).astype(float) for name in names]
    assert found[f"{sensor}_mean"] == pytest.approx([band.mean() for band in pixels], rel=1e-5)
    sheet = folder / "sheet.png"
    assert main(["data", "show", str(folder), "--sensor", sensor, "--count", "2", "--output", str(sheet)]) == 0
    with Image.open(sheet) as image:
        assert 2 * 120 < image.width < 2 * 240
        assert len(image.getcolors(1 << 20) or []) > 1000


def test_the_error_for_a_missing_sensor_says_how_to_read_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stats", str(one_sensor_v2(tmp_path, "s2"))]) == 2
    text = capsys.readouterr().err
    assert "5 of 5 patches are not in" in text and "--sensor s2" in text and text.count("\n") == 1


def test_a_feature_store_of_s1_is_queried_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, store, config = one_sensor_v2(tmp_path / "archive", "s1"), str(tmp_path / "store"), small_config()
    SensorEncoder.from_model(build_model(config), config).eval().save(tmp_path / "encoder")
    encoder = ["--encoder", str(tmp_path / "encoder")]
    assert main(["embed", str(folder), store, *encoder, "--sensor", "s1", "--split", "train"]) == 0
    for name in names_of(2):
        command = ["retrieve", *encoder, "--store", store, "--query", name, "--sensor", "s1", "--k", "2"]
        assert main([*command, "--output", str(tmp_path / "found.png")]) == 0, capsys.readouterr().err
        assert names_of(2).s1 in capsys.readouterr().out


def with_wrong_types(folder: Path, version: str, numbers: range) -> Path:
    """Write an archive in which the S2 images of these pairs are int16 and their S1 images float64."""
    (write_v2 if version == "v2" else write_pickles)(folder)
    values: dict[str, bytes] = {}
    for number in numbers:
        name, v1_name, s1_name = names_of(number)
        s1 = {key: band.astype(np.float64) for key, band in bands_of(number).items() if key[0] == "V"}
        s2 = {key: band.astype(np.int16) for key, band in bands_of(number).items() if key[0] == "B"}
        values |= (
            {name: save(s2), s1_name: save(s1)} if version == "v2" else {v1_name: pickled(s1 | s2, labels_of(number))}
        )
    put(folder, values)
    return folder


FOUND: dict[str, tuple[str, ...]] = {
    "v2": ("band B02 must have dtype U16: found I16", "band VH must have dtype F32: found F64"),
    "v1": ("band VH must be <f4 in row-major order: found <f8",),
}


@pytest.mark.parametrize("version", list(FOUND))
def test_check_reports_a_wrong_band_type_once_with_its_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    assert main(["data", "check", str(with_wrong_types(tmp_path, version, range(10)))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f": {len(FOUND[version])} problems")
    assert len(lines) == 1 + len(FOUND[version]), lines
    for text in FOUND[version]:
        assert sum(line.startswith(f"10 values: {text}, ") for line in lines) == 1, lines


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("version", list(FOUND))
def test_wrong_types_in_the_whole_archive_are_not_reported_as_a_damaged_patch(
    tmp_path: Path, version: str, on_error: str, caplog: pytest.LogCaptureFixture
) -> None:
    split = open_folder(with_wrong_types(tmp_path, version, range(10)), on_error=on_error).split("train")
    with pytest.raises(ArchiveError) as error:
        split.read([0, 1, 2])
    text = str(error.value)
    assert text.endswith(
        f"{FOUND[version][0]}, in 5 of 5 patches checked; write S1 as float32 and S2 as uint16, in row-major order"
    )
    assert names_of(0).v2 not in text and not caplog.records


def test_a_few_patches_with_wrong_types_are_skipped_with_one_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = open_folder(with_wrong_types(tmp_path, "v1", range(2)), on_error="skip").split("train")
    with caplog.at_level(logging.WARNING):
        split.read(range(5))
    assert split.damaged.keys() == {names_of(0).v1, names_of(1).v1}
    assert len(caplog.records) == 1 and "further pairs with this fault are counted, not logged" in caplog.text
