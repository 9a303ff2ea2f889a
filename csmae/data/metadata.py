"""Reads which pairs an archive has and which split each is in: ``metadata.parquet``, or lists of patch names."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from csmae.config import one_line
from csmae.data.errors import ArchiveError
from csmae.sensors import CLASSES

SPLITS = ("train", "validation", "test")

LIST_FILES = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}

METADATA = "metadata.parquet"

_COLUMNS = ("patch_id", "s1_name", "split")

_IS_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view, pa.types.is_large_list_view)

_LIST_RULE = "it must hold one S2 patch name per line, in the first column"

_HEADER = re.compile("patch(es|id|name)?|names?|keys?|id|s2(name|patch|v1name)?")
"""Name of a first column, in lower case and without characters other than letters and digits."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """The metadata table of BigEarthNet v2, N rows; cached by ``read_metadata``."""

    path: Path
    names: NDArray[np.bytes_]
    """S2 patch names of v2 (N,)."""
    s1_names: NDArray[np.bytes_]
    v1_names: NDArray[np.bytes_]
    """S2 patch names of v1; the v2 names if the table has none."""
    splits: NDArray[np.bytes_]
    labels_nc: NDArray[np.bool_]
    """Multi-hot (N, 19); all False if the table has no labels."""

    def find(self, names: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Return the rows of S2 patch names of either version, or of S1 names; -1 for an unknown name."""
        rows = _find(self.names, names)
        for others in (self.v1_names, self.s1_names):
            if (rows < 0).any():
                rows = np.where(rows < 0, _find(others, names), rows)
        return rows

    def rows_of_split(self, split: str) -> NDArray[np.int64]:
        """Return the rows of a split.

        Raises:
            ArchiveError: The split is empty.
        """
        rows = np.flatnonzero(self.splits == split.encode())
        if not len(rows):
            found = ", ".join(repr(name.decode(errors="replace")[:80]) for name in np.unique(self.splits)[:5].tolist())
            raise ArchiveError(
                f"{self.path}: split {split!r} is empty: the column 'split' holds {found}: rename them to"
                f" {', '.join(SPLITS)}, or set data.splits_dir to a folder with {', '.join(LIST_FILES.values())}"
            )
        return rows


def _find(names: NDArray[np.bytes_], wanted: NDArray[np.bytes_]) -> NDArray[np.int64]:
    order = np.argsort(names)
    rows = order[np.minimum(np.searchsorted(names, wanted, sorter=order), len(names) - 1)]
    return np.where(names[rows] == wanted, rows, -1)


def read_metadata(path: Path) -> Metadata:
    """Read ``metadata.parquet``; cached by process and version of the file.

    Raises:
        ArchiveError: The file is not Parquet or has no rows, a column is missing, or a label is not one of the 19.
    """
    state = path.stat()
    return _read(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, *_state: int) -> Metadata:
    try:
        present = pq.read_schema(path).names
        missing = [name for name in _COLUMNS if name not in present]
        if missing:
            raise ArchiveError(
                f"{path}: has no column {missing[0]!r} (found {', '.join(present)}): use the archive's own table"
            )
        v1_name = "s2v1_name" if "s2v1_name" in present else "patch_id"
        table = pq.read_table(path, columns=sorted({*_COLUMNS, v1_name, *({"labels"} & set(present))}))
        if not len(table):
            raise ArchiveError(f"{path}: has no rows: copy or download it again")
        texts = {name: table[name].cast(pa.string()) for name in {*_COLUMNS, v1_name}}
        _check_names(path, texts["patch_id"])
        names, s1_names, v1_names, splits = (
            np.array([text or "" for text in texts[name].to_pylist()], "S")
            for name in ("patch_id", "s1_name", v1_name, "split")
        )
        labels_nc = np.zeros((len(table), len(CLASSES)), bool)
        if "labels" in present:
            _set_labels(labels_nc, path, table["labels"])
        return Metadata(path, names, s1_names, v1_names, splits, labels_nc)
    except ArchiveError:
        raise
    except (pa.ArrowException, OSError, UnicodeError, TypeError, ValueError) as error:
        raise ArchiveError(
            f"{path}: cannot be read as metadata: {one_line(error)}: copy or download it again"
        ) from None


def _check_names(path: Path, names: Any) -> None:
    """Check that each row names a patch, and each patch once: a repeated row would repeat a pair."""
    if names.null_count:
        raise ArchiveError(f"{path}: {names.null_count} rows have no patch_id: copy or download it again")
    if pc.count_distinct(names).as_py() < len(names):
        counts = pc.value_counts(names)
        is_repeated = pc.greater(counts.field("counts"), 1)
        repeated = np.sort(np.array(counts.field("values").filter(is_repeated).to_pylist(), "S"))
        raise ArchiveError(
            f"{path}: lists {len(repeated)} patches more than once: {first_five(repeated)}; keep one row for each"
        )


def _set_labels(labels_nc: NDArray[np.bool_], path: Path, column: Any) -> None:
    if pa.types.is_null(column.type):
        return
    if not any(is_list(column.type) for is_list in _IS_LIST):
        raise ArchiveError(
            f"{path}: column 'labels' must hold lists of class names, found {column.type}: use the archive's own table"
        )
    lists = column.combine_chunks()
    names = pc.list_flatten(lists).cast(pa.string())
    if not len(names):
        return
    classes = pc.index_in(names, value_set=pa.array(CLASSES, names.type))
    if classes.null_count:
        foreign = names.filter(pc.is_null(classes))[0].as_py()
        raise ArchiveError(
            f"{path}: label {foreign!r} is not one of the 19 classes of BigEarthNet: use the archive's own table"
        )
    labels_nc[np.asarray(pc.list_parent_indices(lists)), np.asarray(classes)] = True


def read_names(path: Path) -> NDArray[np.bytes_]:
    """Read the patch names of a split's list: the first column of a CSV file, with or without a header.

    Raises:
        ArchiveError: The file is missing, is not CSV or holds no names, or a name is listed twice.
    """
    try:
        names = np.array(_first_column(path, path.read_text(encoding="utf-8-sig")), "S")
    except csv.Error as error:
        raise ArchiveError(f"{path}: is not CSV: {error}; {_LIST_RULE}") from None
    except FileNotFoundError as error:
        raise ArchiveError(
            f"{path}: cannot be read: {error.strerror}: set data.splits_dir to a folder that holds it"
        ) from None
    except OSError as error:
        raise ArchiveError(f"{path}: cannot be read: {error.strerror}: grant this account read access") from None
    except UnicodeError as error:
        raise ArchiveError(f"{path}: cannot be read: {error}: save it as UTF-8") from None
    if not len(names):
        raise ArchiveError(f"{path}: lists no patch; {_LIST_RULE}")
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        raise ArchiveError(
            f"{path}: {int((counts > 1).sum())} names are listed twice: {first_five(unique[counts > 1])};"
            " keep one row for each"
        )
    return names


def _first_column(path: Path, text: str) -> list[str]:
    names, num_columns = [], 0
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    for row in reader:
        name, num_columns = row[0].strip() if row else "", max(num_columns, len(row))
        if name:
            names.append(name)
        elif any(field.strip() for field in row):
            raise ArchiveError(f"{path}: line {reader.line_num} has no name in its first column; {_LIST_RULE}")
    # A list of one column and one line has no header: its only name is a patch's.
    may_have_header = len(names) > 1 or num_columns > 1
    if names and may_have_header and _HEADER.fullmatch(re.sub(r"[^a-z0-9]", "", names[0].lower())):
        del names[0]
    return names


def first_five(names: NDArray[np.bytes_]) -> str:
    """Return the first names of a list for an error text."""
    shown = ", ".join(name.decode(errors="replace")[:80] for name in names[:5].tolist())
    return f"{shown}, …" if len(names) > 5 else shown
