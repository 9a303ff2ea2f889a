"""How bands are stored in a value, and how their bytes get into a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from csmae.data.pairs import Buffer
from csmae.sensors import (
    IMAGE_SIZE,
    IMAGE_SIZE_20M,
    IMAGE_SIZE_60M,
    S1_BANDS,
    S2_10M_BANDS,
    S2_20M_BANDS,
    S2_60M_BANDS,
)


class Band(NamedTuple):
    """How one band is stored."""

    field: str
    """The batch's tensor that holds the band."""
    channel: int
    """The band's channel in that tensor."""
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
"""Bands that no batch holds; a conversion copies them."""


class Segment(NamedTuple):
    """Contiguous bytes of a value that are copied into a batch."""

    field: str
    """The batch's tensor that receives them."""
    source: int
    """First byte in the value."""
    target: int
    """First byte in the tensor's row."""
    num_bytes: int


Segments = tuple[Segment, ...]


def plan_copies(offsets: Mapping[str, int]) -> Segments:
    """Plan the copies of bands from a value into a row of a batch.

    Args:
        offsets: First byte of each band in the value.

    Returns:
        As few segments as possible: bands that are adjacent in the value and in the batch share one.
    """
    segments: list[Segment] = []
    for name, band in STORED_BANDS.items():
        if name not in offsets:
            continue
        segment = Segment(band.field, offsets[name], band.channel * band.num_bytes, band.num_bytes)
        last = segments[-1] if segments else None
        if last and last.field == segment.field and last.source + last.num_bytes == segment.source:
            segments[-1] = last._replace(num_bytes=last.num_bytes + segment.num_bytes)
        else:
            segments.append(segment)
    return tuple(segments)


def copy_segments(value: NDArray[np.uint8], segments: Segments, buffer: Buffer, row: int) -> None:
    """Copy a value's bands into a row of a buffer."""
    for field, source, target, num_bytes in segments:
        buffer.row_bytes[field][row, target : target + num_bytes] = value[source : source + num_bytes]
