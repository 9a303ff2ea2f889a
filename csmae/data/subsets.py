"""Derives BEN-14K, the small subset of the paper: summer scenes of five tiles (arXiv 2401.07782, section IV-A)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.atomic import atomic_write
from csmae.data.errors import ArchiveError
from csmae.data.metadata import LIST_FILES, METADATA, read_metadata, read_names
from csmae.data.write import report_write_errors

_TILES = frozenset({"34TCR", "34TCS", "34TEQ", "34TFN", "34TFQ"})
_MONTHS = frozenset({6, 7, 8})

_V2_NAME = re.compile(r"S2[AB]_MSIL2A_\d{4}(?P<month>\d\d)\d\dT\d+_N\d+_R\d+_T(?P<tile>\w{5})_\d+_\d+")

_V1_ACQUISITIONS = frozenset(
    {
        "S2A_MSIL2A_20170803T094031",
        "S2A_MSIL2A_20170827T092031",
        "S2B_MSIL2A_20170719T094029",
        "S2B_MSIL2A_20170802T092029",
        "S2B_MSIL2A_20170825T093029",
    }
)
"""A v1 name has no tile, but its time of acquisition determines it: these are all summer scenes of the five tiles."""


def in_ben_14k(name: str) -> bool:
    """Whether a patch belongs to the subset.

    Args:
        name: S2 patch name of either version.
    """
    parts = _V2_NAME.fullmatch(name)
    if parts:
        return int(parts["month"]) in _MONTHS and parts["tile"] in _TILES
    return name.rsplit("_", 2)[0] in _V1_ACQUISITIONS


def write_ben_14k(source: Path, target: Path) -> dict[str, int]:
    """Write the subset's lists, each sorted by name.

    Args:
        source: Folder with the lists of the whole archive, or with its metadata.
        target: Folder of the new lists.

    Returns:
        Number of names by split.

    Raises:
        ArchiveError: The source holds neither, a split has no patch of the subset, or the target cannot be written.
    """
    lists = {}
    for split, names in _names(source).items():
        lists[split] = sorted(name for name in (name.decode() for name in names.tolist()) if in_ben_14k(name))
        if not lists[split]:
            raise ArchiveError(f"{source}: split {split!r} has no patch of BEN-14K among its {len(names)} names")
    with report_write_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for split, chosen in lists.items():
            with atomic_write(target / LIST_FILES[split], concurrent=True) as file:
                file.write("".join(f"{name}\n" for name in chosen).encode())
    return {split: len(chosen) for split, chosen in lists.items()}


def _names(source: Path) -> dict[str, NDArray[np.bytes_]]:
    try:
        has_metadata = (source / METADATA).exists()
    except OSError as error:
        raise ArchiveError(f"{source}: cannot be read: {error.strerror}: pass BigEarthNet's folder") from None
    if has_metadata:
        metadata = read_metadata(source / METADATA)
        return {split: metadata.names[metadata.splits == split.encode()] for split in LIST_FILES}
    return {split: read_names(source / file) for split, file in LIST_FILES.items()}
