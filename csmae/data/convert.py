"""From the layout of BigEarthNet v1 to that of v2: nothing needs to be unpickled again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from csmae.config import Data
from csmae.data.archive import Archive, open_archive
from csmae.data.formats.layout import ArchiveError
from csmae.data.formats.lmdb_index import read_index
from csmae.data.split import Split
from csmae.data.splits import LIST_FILES, METADATA, first_five
from csmae.data.write import LMDB, PAIR_BYTES, Writer, put_pair, require_new, write_metadata, writing
from csmae.sensors import CLASSES

_CHUNK = 128
"""Pairs between commits: what an interruption costs."""


def convert(source: Archive, target: Path, progress: Callable[[int], object]) -> int:
    """Write the pairs of a v1 archive's splits as a v2 archive.

    An interrupted conversion goes on where it stopped. Until the end it stands beside ``target`` under a hidden name. One
    that fails, for a pair or a list is not what it must be, leaves nothing.

    Args:
        source: A v1 archive; if it skips damaged pairs, so does the conversion.
        target: Folder that appears once every pair has been compared with its source.
        progress: Told the number of pairs after each chunk, written or compared: twice all of them in the end.

    Returns:
        Pairs written.

    Raises:
        ArchiveError: The source is no v1 archive, damaged, or nothing says its pairs; or the target is there already or
            cannot be written.
    """
    if not source.is_v1:
        raise ArchiveError(f"{source.store.folder}: is not of BigEarthNet v1: there is nothing to convert")
    require_new(target)
    splits = {name: source.split(name) for name in source.described}
    _check_splits(source, splits)
    partial = target.with_name(f".{target.name}.partial")
    with writing(target):
        try:
            written = _write(splits, partial, progress)
            converted = open_archive(Data(path=str(partial)))
            for name, split in written.items():
                _compare(split, converted.split(name), progress)
        except ArchiveError:  # a full disk and the like are other errors: then the same command goes on
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.replace(target)
    return sum(len(split) for split in written.values())


def _check_splits(source: Archive, splits: dict[str, Split]) -> None:
    """That there is something to convert, and each pair once."""
    if not splits:
        raise ArchiveError(
            f"{source.store.folder.parent}: neither {METADATA} nor a list says which pairs there are; let --splits-dir"
            f" name a folder with {', '.join(LIST_FILES.values())}"
        )
    names, counts = np.unique([name for split in splits.values() for name in split.names], return_counts=True)
    if len(twice := names[counts > 1]):
        raise ArchiveError(
            f"{source.store.folder.parent}: {len(twice)} patches are in two splits: {first_five(twice.astype('S'))};"
            " name each in one"
        )


def _write(splits: dict[str, Split], folder: Path, progress: Callable[[int], object]) -> dict[str, Split]:
    """Write what is not there yet; returns the splits without their damaged pairs."""
    for split in splits.values():
        split.labels()  # kept; damage among them is found before anything is written
    writer = Writer(folder / LMDB, PAIR_BYTES * sum(len(split) for split in splits.values()))
    try:
        there = {key.decode() for key in read_index(folder / LMDB).keys.tolist()}
        for split in splits.values():
            names = split.names
            for rows in _chunks(split):
                missing = [row for row in rows.tolist() if names[row] not in there]
                batch = split.read(missing)
                for number, row in enumerate(missing):
                    other = split.bands_60m(row)
                    if names[row] not in split.damaged:
                        put_pair(writer, names[row], _s1_name(names[row]), batch.row(number), other)
                writer.commit()
                progress(len(rows))
    finally:
        writer.close()
    intact = {name: _without_damaged(split) for name, split in splits.items()}
    write_metadata(folder, [row for name, split in intact.items() for row in _describe(name, split)])
    return intact


def _chunks(split: Split) -> list[Any]:
    return [np.arange(start, min(start + _CHUNK, len(split))) for start in range(0, len(split), _CHUNK)]


def _without_damaged(split: Split) -> Split:
    return split.take(np.delete(np.arange(len(split)), split.damaged_rows()))


def _s1_name(name: str) -> str:
    """A v1 value holds both images under the S2 name: the S1 image gets a name of its own."""
    return f"{name}_S1"


def _describe(split_name: str, split: Split) -> list[dict[str, Any]]:
    """Rows of the metadata."""
    return [
        {
            "patch_id": name,
            "s2v1_name": name,
            "s1_name": _s1_name(name),
            "split": split_name,
            "labels": [CLASSES[index] for index in np.flatnonzero(labels)],
        }
        for name, labels in zip(split.names, split.labels(), strict=True)
    ]


def _compare(split: Split, converted: Split, progress: Callable[[int], object]) -> None:
    if split.names != converted.names:
        raise ArchiveError(f"{converted.store.folder}: {METADATA} is not what was written; repeat the command")
    for rows in _chunks(split):
        pairs = zip(split.read(rows), converted.read(rows), strict=True)
        same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        if not same or any(_differ(split.bands_60m(row), converted.bands_60m(row)) for row in rows.tolist()):
            raise ArchiveError(
                f"{converted.store.folder}: pairs {split.names[rows[0]]} and following are not what was written;"
                " repeat the command"
            )
        progress(len(rows))


def _differ(ours: dict[str, NDArray[np.uint16]], theirs: dict[str, NDArray[np.uint16]]) -> bool:
    return ours.keys() != theirs.keys() or any((ours[name] != theirs[name]).any() for name in ours)
