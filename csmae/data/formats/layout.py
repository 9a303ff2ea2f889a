"""Where the bands' bytes lie in a stored value, and where they go in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from csmae.config import ConfigError
from csmae.sensors import (
    IMAGE_SIZE,
    IMAGE_SIZE_20M,
    IMAGE_SIZE_60M,
    S1_BANDS,
    S2_10M_BANDS,
    S2_20M_BANDS,
    S2_60M_BANDS,
)


class ArchiveError(ConfigError):
    """An archive that cannot be used: the text says which file, what was found and what to do."""


class DamagedValueError(ArchiveError):
    """A stored value that does not hold what it must."""


class BandTypeError(DamagedValueError):
    """A stored value whose pixels are of another type: where all are, it is the archive that is another one."""


class Band(NamedTuple):
    """How one band is stored."""

    field: str
    """The batch's tensor that takes it."""
    channel: int
    dtype: str
    """numpy's name of the type on disk."""
    size: int
    """Pixels along a side."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the band's pixels."""
        return self.size * self.size * int(self.dtype[-1])


STORED_BANDS = (
    {name: Band("s1", i, "<f4", IMAGE_SIZE) for i, name in enumerate(S1_BANDS)}
    | {name: Band("s2_10m", i, "<u2", IMAGE_SIZE) for i, name in enumerate(S2_10M_BANDS)}
    | {name: Band("s2_20m", i, "<u2", IMAGE_SIZE_20M) for i, name in enumerate(S2_20M_BANDS)}
)

STORED_60M_BANDS = {name: Band("", i, "<u2", IMAGE_SIZE_60M) for i, name in enumerate(S2_60M_BANDS)}
"""No batch holds them; a conversion copies them."""


class Run(NamedTuple):
    """Bytes that are copied in one go."""

    field: str
    source: int
    """First byte in the value."""
    target: int
    """First byte in the batch's row."""
    num_bytes: int


Layout = tuple[Run, ...]


def plan(offsets: Mapping[str, int]) -> Layout:
    """The copies that bring bands from a value into a batch's row.

    Args:
        offsets: First byte of each band in the value.

    Returns:
        As few runs as possible: bands that are neighbours in the value and in the batch are one.
    """
    runs: list[Run] = []
    for name, band in STORED_BANDS.items():
        if name not in offsets:
            continue
        run = Run(band.field, offsets[name], band.channel * band.num_bytes, band.num_bytes)
        last = runs[-1] if runs else None
        if last and last.field == run.field and last.source + last.num_bytes == run.source:
            runs[-1] = last._replace(num_bytes=last.num_bytes + run.num_bytes)
        else:
            runs.append(run)
    return tuple(runs)
