"""Errors of a user in folders, lists and metadata are reported in one line."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csmae.config import ConfigError, Synthetic
from csmae.data.errors import ArchiveError
from csmae.data.metadata import read_metadata
from csmae.data.synthetic.archive import ensure_synthetic
from csmae.sensors import CLASSES
from tests.support.archives import FILES, labels_of, names_of, open_folder, put, write_pickles, write_v2


def assert_rejected(folder: Path, *parts: object, split: str | None = None, **values: Any) -> None:
    """Check that opening the archive or its split fails with one line that contains these parts."""
    with pytest.raises(ArchiveError) as error:
        archive = open_folder(folder, **values)
        if split:
            archive.split(split)
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert_rejected(tmp_path / "none", f"data.path: there is no folder {tmp_path / 'none'}")


def test_the_error_for_a_foreign_folder_says_what_an_archive_holds(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    assert_rejected(tmp_path, "must hold one LMDB", "metadata.parquet", "train.csv", "found none")


def test_a_folder_with_two_archives_is_rejected_with_both_names(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"1"})
    (tmp_path / "archive.lmdb").rename(tmp_path / "one.lmdb")
    (tmp_path / "two.lmdb").mkdir()
    (tmp_path / "two.lmdb/data.mdb").write_bytes(b"")
    assert_rejected(tmp_path, "found one.lmdb, two.lmdb")


def test_an_archive_without_patches_is_rejected(tmp_path: Path) -> None:
    put(tmp_path, {})
    assert_rejected(tmp_path, "holds no patches")


def test_a_v2_archive_needs_its_metadata(tmp_path: Path) -> None:
    (write_v2(tmp_path) / "metadata.parquet").unlink()
    assert_rejected(tmp_path, tmp_path, "needs metadata.parquet")


def test_a_v1_archive_needs_its_lists(tmp_path: Path) -> None:
    (write_pickles(tmp_path) / "val.csv").unlink()
    assert_rejected(tmp_path, "val.csv", "data.splits_dir", split="validation")


def test_the_error_for_an_unknown_split_names_the_splits(tmp_path: Path) -> None:
    assert_rejected(write_v2(tmp_path), "train, validation, test: found 'val'", split="val")


def test_an_empty_split_is_rejected(tmp_path: Path) -> None:
    table = pq.read_table(write_v2(tmp_path) / "metadata.parquet")
    pq.write_table(table.slice(0, 8), tmp_path / "metadata.parquet")
    assert_rejected(tmp_path, tmp_path / "metadata.parquet", "split 'test' is empty", split="test")


def lists(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for file in FILES.values():
        (folder / file).write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.mark.parametrize("write", [write_v2, write_pickles])
def test_unknown_names_of_a_list_are_counted_and_five_are_shown(tmp_path: Path, write: Any) -> None:
    names = [names_of(0).v1, *(f"unknown{n}" for n in range(7))]
    where = lists(tmp_path / "lists", names)
    parts = [where / "test.csv", "7 of 8", "unknown0, unknown1, unknown2, unknown3, unknown4, …"]
    assert_rejected(write(tmp_path / "a"), *parts, split="test", splits_dir=str(where))


def test_names_that_are_listed_twice_are_counted_and_five_are_shown(tmp_path: Path) -> None:
    where = lists(tmp_path / "lists", [f"name{n % 6}" for n in range(12)])
    parts = [
        where / "train.csv",
        "6 names are listed twice: name0, name1, name2, name3, name4, …; keep one row for each",
    ]
    assert_rejected(write_v2(tmp_path / "a"), *parts, split="train", splits_dir=str(where))


def test_an_empty_or_missing_list_is_rejected(tmp_path: Path) -> None:
    write_v2(tmp_path / "a")
    where = lists(tmp_path / "lists", [])
    assert_rejected(tmp_path / "a", where / "val.csv", "lists no patch", split="validation", splits_dir=str(where))
    assert_rejected(
        tmp_path / "a",
        "nowhere/val.csv",
        "No such file or directory: set data.splits_dir to a folder that holds it",
        split="validation",
        splits_dir="nowhere",
    )
    (where / "val.csv").write_bytes(b"\xff\xfe\x00")
    assert_rejected(
        tmp_path / "a",
        where / "val.csv",
        "cannot be read",
        "save it as UTF-8",
        split="validation",
        splits_dir=str(where),
    )


def test_lists_with_a_byte_order_mark_and_any_line_ending_are_read(tmp_path: Path) -> None:
    where = lists(tmp_path / "lists", [])
    (where / "train.csv").write_bytes(f"\ufeff{names_of(0).v2}\r\n\r\n {names_of(2).v1} \n".encode())
    archive = open_folder(write_v2(tmp_path / "a"), splits_dir=str(where))
    assert archive.split("train").names == [names_of(0).v2, names_of(2).v2]


def test_invalid_metadata_is_rejected(tmp_path: Path) -> None:
    file = write_v2(tmp_path) / "metadata.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns("s1_name"), file)
    assert_rejected(tmp_path, file, "has no column 's1_name' (found patch_id")
    pq.write_table(table.slice(0, 0), file)
    assert_rejected(tmp_path, file, "has no rows")
    rows = table.to_pylist()
    rows[3]["labels"] = ["Lava"]
    pq.write_table(pa.Table.from_pylist(rows), file)
    assert_rejected(tmp_path, file, "label 'Lava' is not one of the 19 classes", "use the archive's own")
    file.write_bytes(b"PAR1 no parquet PAR1")
    assert_rejected(tmp_path, file, "cannot be read as metadata", "copy or download it again")


def test_statistics_of_the_wrong_length_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"data.s2_mean must have 10 values, one per band: found 2"):
        open_folder(Path(), s2_mean=(1, 2))
    assert issubclass(ArchiveError, ConfigError)


@pytest.mark.slow
def test_an_archive_with_all_rows_of_the_official_metadata_opens_in_two_seconds(tmp_path: Path) -> None:
    count = 480_038
    numbers = np.arange(count)
    names, v1_names, s1_names = ([names_of(number)[kind] for number in numbers.tolist()] for kind in range(3))
    splits = np.array(["train", "validation", "test"])[numbers % 4 % 3]
    labels = [[CLASSES[n % 19], CLASSES[n * 7 % 19]] for n in range(count)]
    columns = {"patch_id": names, "s2v1_name": v1_names, "s1_name": s1_names, "split": splits, "labels": labels}
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    values = dict.fromkeys(sorted([*names, *s1_names]), bytes(8) + b"{" + bytes(15))
    put(tmp_path, values, map_size=1 << 30)
    start = time.process_time()
    split = open_folder(tmp_path).split("train")
    assert time.process_time() - start < 2
    assert len(split) == len(split.labels()) == int((splits == "train").sum())
    assert read_metadata(tmp_path / "metadata.parquet").labels_nc.sum(1).max() == 2


def test_metadata_labels_are_multi_hot(tmp_path: Path) -> None:
    labels = read_metadata(write_v2(tmp_path) / "metadata.parquet").labels_nc
    assert [[CLASSES[c] for c in np.flatnonzero(row)] for row in labels] == [sorted(labels_of(n)) for n in range(10)]


def test_the_error_for_an_empty_split_shows_the_names_in_the_metadata(tmp_path: Path) -> None:
    path = write_v2(tmp_path) / "metadata.parquet"
    table = pq.read_table(path)
    column = ["val" if split == "validation" else split for split in table["split"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("split"), "split", [column]), path)
    texts = ["split 'validation' is empty", "holds 'test', 'train', 'val'", "rename them to train, validation, test"]
    assert_rejected(tmp_path, *texts, "data.splits_dir", split="validation")


def test_the_error_for_an_unwritable_cache_names_the_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSMAE_CACHE", "/dev/null/cache")
    with pytest.raises(ArchiveError, match="Not a directory; free some space, or set CSMAE_CACHE to a folder"):
        ensure_synthetic(Synthetic(num_train=2, num_validation=2, num_test=2))
