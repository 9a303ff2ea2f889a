"""Converts an archive from the layout of BigEarthNet v1 to that of v2, which needs no unpickling."""

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
from csmae.data.errors import ArchiveError
from csmae.data.formats.lmdb_index import read_index
from csmae.data.loader import sequential_rows
from csmae.data.metadata import LIST_FILES, METADATA, first_five
from csmae.data.split import Split
from csmae.data.write import LMDB_NAME, LmdbWriter, report_write_errors, require_new, write_metadata
from csmae.sensors import CLASSES

_CHUNK = 128
"""Pairs between commits: an interruption loses at most these."""


def convert(source: Archive, target: Path, progress: Callable[[int], object]) -> int:
    """Write the pairs of a v1 archive's splits as a v2 archive.

    The archive is written to a hidden folder beside ``target`` and renamed at the end. An interrupted conversion resumes; one
    that fails because of an invalid pair or list leaves nothing behind.

    Args:
        source: A v1 archive; if it skips damaged pairs, so does the conversion.
        target: New folder.
        progress: Called with the number of pairs after each chunk that is written or compared; the numbers add up to twice
            the number of pairs.

    Returns:
        Number of pairs written, each compared with its source.

    Raises:
        ArchiveError: The source is not a v1 archive, is damaged or defines no splits, or the target exists or cannot be
            written.
    """
    if not source.is_v1:
        raise ArchiveError(f"{source.lmdb.folder}: is not a BigEarthNet v1 archive: there is nothing to convert")
    require_new(target)
    splits = {name: source.split(name) for name in source.split_names}
    _check_splits(source, splits)
    partial = target.with_name(f".{target.name}.partial")
    with report_write_errors(target):
        try:
            written = _write(splits, partial, progress)
            converted = open_archive(Data(path=str(partial)))
            for name, split in written.items():
                _compare(split, converted.split(name), progress)
        except ArchiveError:  # a full disk and the like raise other errors: then the same command resumes
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.replace(target)
    return sum(len(split) for split in written.values())


def _check_splits(source: Archive, splits: dict[str, Split]) -> None:
    """Check that there is something to convert, and that no pair is in two splits."""
    folder = source.lmdb.folder.parent
    if not splits:
        raise ArchiveError(
            f"{folder}: neither {METADATA} nor a list defines the splits; set --splits-dir to a folder with"
            f" {', '.join(LIST_FILES.values())}"
        )
    names, counts = np.unique([name for split in splits.values() for name in split.names], return_counts=True)
    if len(repeated := names[counts > 1]):
        raise ArchiveError(
            f"{folder}: {len(repeated)} patches are in two splits: {first_five(repeated.astype('S'))};"
            " list each in one split only"
        )


def _write(splits: dict[str, Split], folder: Path, progress: Callable[[int], object]) -> dict[str, Split]:
    """Write the pairs that ``folder`` lacks; return the splits without their damaged pairs."""
    for split in splits.values():
        split.labels()  # cached; reports damaged labels before anything is written
    writer = LmdbWriter(folder / LMDB_NAME, sum(len(split) for split in splits.values()))
    try:
        existing = {key.decode() for key in read_index(folder / LMDB_NAME).keys.tolist()}
        for split in splits.values():
            names = split.names
            for rows in sequential_rows(len(split), _CHUNK):
                missing = [row for row in rows.tolist() if names[row] not in existing]
                batch = split.read(missing)
                for number, row in enumerate(missing):
                    bands_60m = split.bands_60m(row)
                    if names[row] not in split.damaged:
                        writer.put_pair(names[row], _s1_name(names[row]), batch.pair(number), bands_60m)
                writer.commit()
                progress(len(rows))
    finally:
        writer.close()
    intact = {
        name: split.take(np.delete(np.arange(len(split)), split.damaged_rows())) for name, split in splits.items()
    }
    write_metadata(folder, [row for name, split in intact.items() for row in _metadata_rows(name, split)])
    return intact


def _s1_name(name: str) -> str:
    """Name the S1 image, which v1 stores under the name of the S2 image."""
    return f"{name}_S1"


def _metadata_rows(split_name: str, split: Split) -> list[dict[str, Any]]:
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


def _compare(source: Split, converted: Split, progress: Callable[[int], object]) -> None:
    """Check that the pairs were written as they are in the source."""
    if source.names != converted.names:
        raise ArchiveError(f"{converted.lmdb.folder}: {METADATA} does not match the source; repeat the command")
    for rows in sequential_rows(len(source), _CHUNK):
        tensors = zip(source.read(rows), converted.read(rows), strict=True)
        same = all(torch.equal(ours, theirs) for ours, theirs in tensors)
        if not same or any(_differ(source.bands_60m(row), converted.bands_60m(row)) for row in rows.tolist()):
            raise ArchiveError(
                f"{converted.lmdb.folder}: pairs from {source.names[rows[0]]} on do not match the source; repeat the command"
            )
        progress(len(rows))


def _differ(ours: dict[str, NDArray[np.uint16]], theirs: dict[str, NDArray[np.uint16]]) -> bool:
    return ours.keys() != theirs.keys() or any((ours[name] != theirs[name]).any() for name in ours)
