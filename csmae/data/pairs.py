"""Batches of Sentinel-1/Sentinel-2 image pairs in memory, at native resolution.

B pairs; images at 10 m have 120×120 pixels, at 20 m 60×60; bands are in the order of ``csmae.sensors``.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csmae.sensors import IMAGE_SIZE, IMAGE_SIZE_20M, S1_BANDS, S2_10M_BANDS, S2_20M_BANDS, SENSORS


class PairBatch(NamedTuple):
    """Images of B pairs; the tensors of a sensor that is not read have no rows."""

    s1: Tensor
    """Backscatter in dB, float32 (B, 2, 120, 120)."""
    s2_10m: Tensor
    """Reflectance times 10,000, uint16 (B, 4, 120, 120)."""
    s2_20m: Tensor
    """Reflectance times 10,000, uint16 (B, 6, 60, 60)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """Copy the batch to a device."""
        return PairBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def select(self, rows: slice) -> PairBatch:
        """Return a view of some pairs."""
        return PairBatch(*(tensor[rows] for tensor in self))

    def pair(self, row: int) -> PairBatch:
        """Return a view of one pair, without the batch dimension."""
        return PairBatch(*(tensor[row] for tensor in self))


_FIELDS: dict[str, tuple[str, ...]] = {"s1": ("s1",), "s2": ("s2_10m", "s2_20m")}
"""The batch's tensors of each sensor."""

_SHAPES = {
    "s1": (torch.float32, (len(S1_BANDS), IMAGE_SIZE, IMAGE_SIZE)),
    "s2_10m": (torch.uint16, (len(S2_10M_BANDS), IMAGE_SIZE, IMAGE_SIZE)),
    "s2_20m": (torch.uint16, (len(S2_20M_BANDS), IMAGE_SIZE_20M, IMAGE_SIZE_20M)),
}

_MIN_HUGE_PAGE_BYTES = 1024 * 1024
"""Smallest allocation that uses huge pages."""


@dataclass(frozen=True)
class Buffer:
    """A preallocated batch and the bytes of its rows."""

    batch: PairBatch
    row_bytes: dict[str, NDArray[np.uint8]]
    """For each tensor of the batch (B, bytes per row), sharing its memory."""


def allocate(num_pairs: int, sensors: tuple[str, ...] = SENSORS, pin: bool = False) -> Buffer:
    """Allocate memory for a batch.

    Args:
        num_pairs: Rows of the tensors of ``sensors``; the others have none.
        sensors: The sensors that will be read.
        pin: Page-lock the memory, so that copies to a GPU are asynchronous.
    """
    fields = {field for sensor in sensors for field in _FIELDS[sensor]}
    sizes = {field: num_pairs * math.prod(shape) * dtype.itemsize for field, (dtype, shape) in _SHAPES.items()}
    # One block for all tensors: blocks of several sizes, allocated every epoch, fragment the heap.
    memory = _allocate_bytes(sum(sizes[field] for field in fields), pin)
    tensors, start = {}, 0
    for field, (dtype, shape) in _SHAPES.items():
        end = start + (sizes[field] if field in fields else 0)
        tensors[field] = memory[start:end].view(dtype).view(-1, *shape)
        start = end
    row_bytes = {field: tensors[field].flatten(1).numpy().view(np.uint8) for field in fields}
    return Buffer(PairBatch(**tensors), row_bytes)


def _allocate_bytes(num_bytes: int, pin: bool) -> Tensor:
    if pin or num_bytes < _MIN_HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
    # With pages of 4 kB, the first use of an epoch's buffers takes as long as reading a thousand pairs, and blocks of
    # this size fragment the heap.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
