"""``metadata.parquet`` as other tools write it, and its errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csmae.cli.main import main
from csmae.data.errors import ArchiveError
from csmae.sensors import CLASSES
from tests.support.archives import labels_of, names_of, open_folder, write_pickles, write_v2

NAMES = ("patch_id", "s1_name", "s2v1_name", "split")


def rewrite(folder: Path, change: Any) -> Path:
    """Change the metadata of an archive."""
    file = folder / "metadata.parquet"
    pq.write_table(change(pq.read_table(file)), file)
    return folder


def repeat_rows(*numbers: int, **values: str) -> Any:
    """Repeat the rows of these pairs with some values changed."""

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        return pa.Table.from_pylist([*rows, *(rows[number] | values for number in numbers)], schema=table.schema)

    return change


@pytest.mark.parametrize("values", [{}, {"split": "test"}, {"s1_name": "another"}])
def test_metadata_that_lists_patches_twice_is_rejected_when_opened(tmp_path: Path, values: dict[str, str]) -> None:
    rewrite(write_v2(tmp_path), repeat_rows(3, 1, 3, **values))
    with pytest.raises(ArchiveError) as error:
        open_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'metadata.parquet'}: lists 2 patches more than once: {names_of(1).v2}, {names_of(3).v2};"
        " keep one row for each"
    )


def test_data_check_reports_patches_that_the_metadata_lists_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(write_v2(tmp_path), repeat_rows(2))
    assert main(["data", "check", str(tmp_path)]) == 1
    assert f"lists 1 patches more than once: {names_of(2).v2}" in capsys.readouterr().out


def test_v1_patches_that_the_metadata_lists_twice_are_rejected(tmp_path: Path) -> None:
    write_v2(tmp_path / "v2")
    write_pickles(tmp_path / "v1")
    rewrite(tmp_path / "v2", repeat_rows(4, patch_id="another")).joinpath("metadata.parquet").rename(
        tmp_path / "v1/metadata.parquet"
    )
    (tmp_path / "v1/train.csv").unlink()
    with pytest.raises(ArchiveError, match=f"split train: 1 patches are listed twice: {names_of(4).v1}; keep one row"):
        open_folder(tmp_path / "v1").split("train")


def test_a_row_without_a_name_is_rejected(tmp_path: Path) -> None:
    rewrite(
        write_v2(tmp_path),
        lambda table: table.set_column(0, "patch_id", pa.array([None, *table["patch_id"].to_pylist()[1:]])),
    )
    with pytest.raises(ArchiveError, match=r"metadata\.parquet: 1 rows have no patch_id: copy or download it again"):
        open_folder(tmp_path)


def with_string_type(kind: pa.DataType) -> Any:
    """Write the columns of names with another string type."""

    def change(table: pa.Table) -> pa.Table:
        for name in NAMES:
            column = table[name].combine_chunks()
            column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
            table = table.set_column(table.column_names.index(name), name, column)
        return table

    return change


def with_label_type(kind: pa.DataType, make: Any = pa.list_) -> Any:
    """Write the labels as lists of another string type."""

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
        *(
            pytest.param(with_string_type(kind), id=f"names {kind}")
            for kind in (pa.string_view(), pa.large_string(), DICTIONARY)
        ),
        *(
            pytest.param(with_label_type(kind), id=f"labels {kind}")
            for kind in (pa.string_view(), pa.large_string(), DICTIONARY)
        ),
        pytest.param(with_label_type(pa.string(), pa.large_list), id="labels in large lists"),
        pytest.param(with_label_type(pa.string_view(), pa.list_view), id="labels in list views"),
    ],
)
def test_columns_of_any_string_type_are_read(tmp_path: Path, change: Any) -> None:
    archive = open_folder(rewrite(write_v2(tmp_path), change))
    split = archive.split("train")
    assert split.names == [names_of(number).v2 for number in range(5)]
    assert [[CLASSES[c] for c in np.flatnonzero(row)] for row in split.labels()] == [
        sorted(labels_of(number)) for number in range(5)
    ]
    assert len(archive.select(np.array([names_of(7).v1], "S"), "test")) == 1


def test_labels_that_are_not_lists_are_rejected(tmp_path: Path) -> None:
    rewrite(write_v2(tmp_path), lambda table: table.set_column(4, "labels", pa.array(["Pastures"] * 10)))
    with pytest.raises(
        ArchiveError, match=r"metadata\.parquet: column 'labels' must hold lists of class names, found string"
    ):
        open_folder(tmp_path)
