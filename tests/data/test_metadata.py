"""``metadata.parquet`` as other tools write it, and what must not pass unnoticed in it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csmae.__main__ import main
from csmae.data.archive import ArchiveError
from csmae.sensors import CLASSES
from tests.support.archives import labels_of, names_of, open_folder, write_pickles, write_v2

NAMES = ("patch_id", "s1_name", "s2v1_name", "split")


def rewrite(folder: Path, change: Any) -> Path:
    """The archive with its table of metadata changed."""
    file = folder / "metadata.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    return folder


def twice(*numbers: int, **values: str) -> Any:
    """Appends rows of these pairs again, with other values."""

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        return pa.Table.from_pylist([*rows, *(rows[number] | values for number in numbers)], schema=table.schema)

    return change


@pytest.mark.parametrize("values", [{}, {"split": "test"}, {"s1_name": "another"}])
def test_metadata_that_lists_patches_twice_is_refused_on_opening(tmp_path: Path, values: dict[str, str]) -> None:
    rewrite(write_v2(tmp_path), twice(3, 1, 3, **values))
    with pytest.raises(ArchiveError) as error:
        open_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'metadata.parquet'}: lists 2 patches more than once: {names_of(1)[0]}, {names_of(3)[0]};"
        " leave one row for each"
    )


def test_data_check_finds_patches_that_the_metadata_lists_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(write_v2(tmp_path), twice(2))
    assert main(["data", "check", str(tmp_path)]) == 1
    assert f"lists 1 patches more than once: {names_of(2)[0]}" in capsys.readouterr().out


def test_patches_of_v1_that_the_metadata_lists_twice_are_refused(tmp_path: Path) -> None:
    write_v2(tmp_path / "v2")
    write_pickles(tmp_path / "v1")
    rewrite(tmp_path / "v2", twice(4, patch_id="another")).joinpath("metadata.parquet").rename(
        tmp_path / "v1/metadata.parquet"
    )
    (tmp_path / "v1/train.csv").unlink()
    with pytest.raises(ArchiveError, match=f"split train: 1 patches are listed twice: {names_of(4)[1]}; leave one row"):
        open_folder(tmp_path / "v1").split("train")


def test_a_row_without_a_name_is_refused(tmp_path: Path) -> None:
    rewrite(
        write_v2(tmp_path),
        lambda table: table.set_column(0, "patch_id", pa.array([None, *table["patch_id"].to_pylist()[1:]])),
    )
    with pytest.raises(ArchiveError, match=r"metadata\.parquet: 1 rows have no patch_id: copy or download it again"):
        open_folder(tmp_path)


def texts(kind: pa.DataType) -> Any:
    """Writes the columns of names in another type of text."""

    def change(table: pa.Table) -> pa.Table:
        for name in NAMES:
            column = table[name].combine_chunks()
            column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
            table = table.set_column(table.column_names.index(name), name, column)
        return table

    return change


def lists(kind: pa.DataType, make: Any = pa.list_) -> Any:
    """Writes the labels as lists of another type of text."""

    def change(table: pa.Table) -> pa.Table:
        column = table["labels"].combine_chunks()
        if pa.types.is_dictionary(kind):
            column = pa.ListArray.from_arrays(column.offsets, column.values.dictionary_encode())
        else:
            column = pa.array(column.to_pylist(), make(kind))
        return table.set_column(table.column_names.index("labels"), "labels", column)

    return change


DICTIONARY = pa.dictionary(pa.int32(), pa.string())


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(texts(kind), id=f"names {kind}") for kind in (pa.string_view(), pa.large_string(), DICTIONARY)),
        *(pytest.param(lists(kind), id=f"labels {kind}") for kind in (pa.string_view(), pa.large_string(), DICTIONARY)),
        pytest.param(lists(pa.string(), pa.large_list), id="labels in large lists"),
        pytest.param(lists(pa.string_view(), pa.list_view), id="labels in list views"),
    ],
)
def test_columns_of_any_type_of_text_are_read(tmp_path: Path, change: Any) -> None:
    archive = open_folder(rewrite(write_v2(tmp_path), change))
    split = archive.split("train")
    assert split.names == [names_of(number)[0] for number in range(5)]
    assert [[CLASSES[c] for c in np.flatnonzero(row)] for row in split.labels()] == [
        sorted(labels_of(number)) for number in range(5)
    ]
    assert len(archive.named(np.array([names_of(7)[1]], "S"), "test")) == 1


def test_labels_that_are_no_lists_are_named(tmp_path: Path) -> None:
    rewrite(write_v2(tmp_path), lambda table: table.set_column(4, "labels", pa.array(["Pastures"] * 10)))
    with pytest.raises(
        ArchiveError, match=r"metadata\.parquet: column 'labels' must hold lists of class names, found string"
    ):
        open_folder(tmp_path)
