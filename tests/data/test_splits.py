"""What a user can get wrong about folders, lists and metadata is said in one line."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csmae.config import ConfigError, Synthetic
from csmae.data.archive import ArchiveError
from csmae.data.splits import read_metadata
from csmae.data.synthetic.archive import ensure_synthetic
from csmae.sensors import CLASSES
from tests.support.archives import FILES, labels_of, names_of, open_folder, put, write_pickles, write_v2


def refused(folder: Path, *parts: object, split: str | None = None, **values: Any) -> None:
    """That opening the archive, or then its split, ends with one line that holds these parts."""
    with pytest.raises(ArchiveError) as error:
        archive = open_folder(folder, **values)
        if split:
            archive.split(split)
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none", f"data.path: there is no folder {tmp_path / 'none'}")


def test_a_foreign_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    refused(tmp_path, "must hold one LMDB", "metadata.parquet", "train.csv", "found none")


def test_a_folder_with_two_archives_names_both(tmp_path: Path) -> None:
    put(tmp_path, {"a": b"1"})
    (tmp_path / "archive.lmdb").rename(tmp_path / "one.lmdb")
    (tmp_path / "two.lmdb").mkdir()
    (tmp_path / "two.lmdb/data.mdb").write_bytes(b"")
    refused(tmp_path, "found one.lmdb, two.lmdb")


def test_an_archive_without_patches_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {})
    refused(tmp_path, "holds no patches")


def test_an_archive_of_v2_needs_its_metadata(tmp_path: Path) -> None:
    (write_v2(tmp_path) / "metadata.parquet").unlink()
    refused(tmp_path, tmp_path, "needs metadata.parquet")


def test_an_archive_of_v1_needs_its_lists(tmp_path: Path) -> None:
    (write_pickles(tmp_path) / "val.csv").unlink()
    refused(tmp_path, "val.csv", "data.splits_dir", split="validation")


def test_a_split_that_does_not_exist_names_those_that_do(tmp_path: Path) -> None:
    refused(write_v2(tmp_path), "train, validation, test, not 'val'", split="val")


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    table = pq.read_table(write_v2(tmp_path) / "metadata.parquet")
    pq.write_table(table.slice(0, 8), tmp_path / "metadata.parquet")
    refused(tmp_path, tmp_path / "metadata.parquet", "split 'test' is empty", split="test")


def lists(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for file in FILES.values():
        (folder / file).write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.mark.parametrize("write", [write_v2, write_pickles])
def test_unknown_names_of_a_list_are_counted_and_the_first_five_shown(tmp_path: Path, write: Any) -> None:
    names = [names_of(0)[1], *(f"unknown{n}" for n in range(7))]
    where = lists(tmp_path / "lists", names)
    parts = [where / "test.csv", "7 of 8", "unknown0, unknown1, unknown2, unknown3, unknown4, …"]
    refused(write(tmp_path / "a"), *parts, split="test", splits_dir=str(where))


def test_names_that_are_listed_twice_are_counted_and_the_first_five_shown(tmp_path: Path) -> None:
    where = lists(tmp_path / "lists", [f"name{n % 6}" for n in range(12)])
    parts = [
        where / "train.csv",
        "6 names are listed twice: name0, name1, name2, name3, name4, …; leave one row for each",
    ]
    refused(write_v2(tmp_path / "a"), *parts, split="train", splits_dir=str(where))


def test_a_list_without_names_or_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_v2(tmp_path / "a")
    where = lists(tmp_path / "lists", [])
    refused(tmp_path / "a", where / "val.csv", "names no patch", split="validation", splits_dir=str(where))
    refused(
        tmp_path / "a",
        "nowhere/val.csv",
        "No such file or directory: let data.splits_dir name a folder with it",
        split="validation",
        splits_dir="nowhere",
    )
    (where / "val.csv").write_bytes(b"\xff\xfe\x00")
    refused(
        tmp_path / "a",
        where / "val.csv",
        "cannot be read",
        "save it as UTF-8",
        split="validation",
        splits_dir=str(where),
    )


def test_lists_with_a_byte_order_mark_and_any_line_end_are_read(tmp_path: Path) -> None:
    where = lists(tmp_path / "lists", [])
    (where / "train.csv").write_bytes(f"\ufeff{names_of(0)[0]}\r\n\r\n {names_of(2)[1]} \n".encode())
    archive = open_folder(write_v2(tmp_path / "a"), splits_dir=str(where))
    assert archive.split("train").names == [names_of(0)[0], names_of(2)[0]]


def test_metadata_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    file = write_v2(tmp_path) / "metadata.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns("s1_name"), file)
    refused(tmp_path, file, "has no column 's1_name' (there are patch_id")
    pq.write_table(table.slice(0, 0), file)
    refused(tmp_path, file, "has no rows")
    rows = table.to_pylist()
    rows[3]["labels"] = ["Lava"]
    pq.write_table(pa.Table.from_pylist(rows), file)
    refused(tmp_path, file, "label 'Lava' is not one of the 19 classes", "use the archive's own")
    file.write_bytes(b"PAR1 no parquet PAR1")
    refused(tmp_path, file, "cannot be read as metadata", "copy or download it again")


def test_statistics_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.s2_mean must have 10 values, one a band: found 2"):
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


def test_labels_of_the_metadata_are_multi_hot(tmp_path: Path) -> None:
    labels = read_metadata(write_v2(tmp_path) / "metadata.parquet").labels_nc
    assert [[CLASSES[c] for c in np.flatnonzero(row)] for row in labels] == [sorted(labels_of(n)) for n in range(10)]


def test_a_split_of_another_name_is_told_with_the_names_that_there_are(tmp_path: Path) -> None:
    path = write_v2(tmp_path) / "metadata.parquet"
    table = pq.read_table(path)
    column = ["val" if split == "validation" else split for split in table["split"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("split"), "split", [column]), path)
    texts = ["split 'validation' is empty", "holds 'test', 'train', 'val'", "rename them to train, validation, test"]
    refused(tmp_path, *texts, "data.splits_dir", split="validation")


def test_a_home_that_cannot_be_written_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSMAE_CACHE", "/dev/null/cache")
    with pytest.raises(ArchiveError, match="Not a directory; make room, or set CSMAE_CACHE to a folder"):
        ensure_synthetic(Synthetic(num_train=2, num_validation=2, num_test=2))
