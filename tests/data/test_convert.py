"""``data convert`` converts every kind of v1 archive; a conversion that fails leaves nothing behind."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from csmae.cli.main import main
from tests.support.archives import (
    FILES,
    bands_of,
    labels_of,
    names_of,
    open_folder,
    put,
    without_labels,
    write_pickles,
    write_v2,
)
from tests.support.v1_pickles import pickled


def convert(source: Path, target: Path, *options: str) -> int:
    return main(["data", "convert", str(source), str(target), *options])


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def v1_with_metadata(folder: Path) -> Path:
    """Write a v1 archive without lists, with the metadata of v2."""
    write_pickles(folder / "v1")
    shutil.move(write_v2(folder / "other") / "metadata.parquet", folder / "v1")
    shutil.rmtree(folder / "other")
    for file in FILES.values():
        (folder / "v1" / file).unlink()
    return folder / "v1"


def assert_same_pairs(v1: Path, v2: Path) -> None:
    source, converted = open_folder(v1), open_folder(v2)
    for name in ("train", "validation", "test"):
        ours, theirs = source.split(name), converted.split(name)
        assert ours.names == theirs.names and np.array_equal(ours.labels(), theirs.labels())
        pairs = zip(ours.read(range(len(ours))), theirs.read(range(len(ours))), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_v1_archive_with_metadata_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = v1_with_metadata(tmp_path)
    assert convert(source, tmp_path / "v2") == 0, capsys.readouterr().err
    assert "10 pairs of 10, each compared with its source" in capsys.readouterr().out
    assert_same_pairs(source, tmp_path / "v2")
    assert contents(tmp_path) == {"v1", "v2"}


def test_a_list_takes_precedence_over_the_metadata_of_its_split(tmp_path: Path) -> None:
    source = v1_with_metadata(tmp_path)
    (source / "val.csv").write_text(f"{names_of(6).v1},x\n")
    assert convert(source, tmp_path / "v2") == 0
    assert [len(open_folder(tmp_path / "v2").split(name)) for name in ("train", "validation", "test")] == [5, 1, 2]
    assert_same_pairs(source, tmp_path / "v2")


def test_labels_missing_from_the_metadata_are_read_from_the_values(tmp_path: Path) -> None:
    source = without_labels(v1_with_metadata(tmp_path))
    assert open_folder(source).split("train").labels().sum(1).tolist() == [2] * 5
    assert convert(source, tmp_path / "v2") == 0
    assert_same_pairs(source, tmp_path / "v2")


def test_an_archive_without_splits_is_rejected_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = v1_with_metadata(tmp_path)
    (source / "metadata.parquet").unlink()
    assert convert(source, tmp_path / "v2") == 2
    text = capsys.readouterr().err
    assert "neither metadata.parquet nor a list defines the splits" in text and text.count("\n") == 1
    assert contents(tmp_path) == {"v1"}


@pytest.mark.parametrize("number", [0, 9])
def test_a_conversion_that_fails_leaves_no_partial_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    name = names_of(number).v1
    put(write_pickles(tmp_path / "v1"), {name: b"damaged"})
    assert convert(tmp_path / "v1", tmp_path / "v2") == 2
    assert name in capsys.readouterr().err
    assert contents(tmp_path) == {"v1"}
    assert convert(tmp_path / "v1", tmp_path / "v2", "--on-error", "skip") == 0
    assert contents(tmp_path) == {"v1", "v2"}


def test_invalid_labels_leave_no_partial_archive(tmp_path: Path) -> None:
    put(write_pickles(tmp_path / "v1"), {names_of(2).v1: pickled(bands_of(2), ["Lava"])})
    assert convert(tmp_path / "v1", tmp_path / "v2") == 2
    assert contents(tmp_path) == {"v1"}


def test_a_patch_in_two_splits_is_rejected_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_pickles(tmp_path / "v1")
    with (source / "test.csv").open("a") as file:
        file.write(f"{names_of(1).v1}\n")
    assert convert(source, tmp_path / "v2") == 2
    assert f"1 patches are in two splits: {names_of(1).v1}" in capsys.readouterr().err
    assert contents(tmp_path) == {"v1"}


def test_a_conversion_that_skips_damage_skips_invalid_labels(tmp_path: Path) -> None:
    put(write_pickles(tmp_path / "v1"), {names_of(2).v1: pickled(bands_of(2), ["Lava"])})
    assert convert(tmp_path / "v1", tmp_path / "v2", "--on-error", "skip") == 0
    names = open_folder(tmp_path / "v2").split("train").names
    assert names == [names_of(number).v1 for number in (0, 1, 3, 4)]
    assert labels_of(2), "an intact one has labels"
