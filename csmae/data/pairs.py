"""Pairs: what a batch of co-registered images is in memory, at native resolution.

Shapes: B pairs, 10 m images 120×120, 20 m images 60×60; band orders are those of ``csmae.sensors``.
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
    """Images of B scenes; a sensor that was not asked for has no rows."""

    s1: Tensor
    """Backscatter in dB, float32 (B, 2, 120, 120)."""
    s2_10m: Tensor
    """Reflectance times 10,000, uint16 (B, 4, 120, 120)."""
    s2_20m: Tensor
    """Reflectance times 10,000, uint16 (B, 6, 60, 60)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch on a device."""
        return PairBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def some(self, rows: slice) -> PairBatch:
        """Some of the pairs, without a copy."""
        return PairBatch(*(tensor[rows] for tensor in self))

    def row(self, number: int) -> PairBatch:
        """One pair, without the batch dimension."""
        return PairBatch(*(tensor[number] for tensor in self))


FIELDS: dict[str, tuple[str, ...]] = {"s1": ("s1",), "s2": ("s2_10m", "s2_20m")}
"""Which of a batch's tensors hold a sensor's bands."""

_SHAPES = {
    "s1": (torch.float32, (len(S1_BANDS), IMAGE_SIZE, IMAGE_SIZE)),
    "s2_10m": (torch.uint16, (len(S2_10M_BANDS), IMAGE_SIZE, IMAGE_SIZE)),
    "s2_20m": (torch.uint16, (len(S2_20M_BANDS), IMAGE_SIZE_20M, IMAGE_SIZE_20M)),
}


_HUGE = 1024 * 1024
"""Bytes from which memory is worth huge pages."""


@dataclass(frozen=True)
class Buffer:
    """A preallocated batch and the bytes of its rows."""

    batch: PairBatch
    rows: dict[str, NDArray[np.uint8]]
    """For each tensor of the batch (B, bytes a row), sharing its memory."""

    def head(self, num_pairs: int) -> PairBatch:
        """The first pairs, without a copy."""
        return self.batch.some(slice(num_pairs))


def allocate(num_pairs: int, sensors: tuple[str, ...] = SENSORS, pin: bool = False) -> Buffer:
    """Memory for a batch.

    Args:
        num_pairs: Rows of each asked sensor's tensors; the others have none.
        sensors: Those that will be read.
        pin: Page-lock the memory, so that copies to a GPU need not wait.
    """
    asked = {field for sensor in sensors for field in FIELDS[sensor]}
    sizes = {field: num_pairs * math.prod(shape) * dtype.itemsize for field, (dtype, shape) in _SHAPES.items()}
    # One block for all: blocks of several sizes, epoch after epoch, leave holes in the heap.
    parts = _memory(sum(sizes[field] for field in asked), pin)
    tensors, start = {}, 0
    for field, (dtype, shape) in _SHAPES.items():
        end = start + (sizes[field] if field in asked else 0)
        tensors[field] = parts[start:end].view(dtype).view(-1, *shape)
        start = end
    rows = {field: tensors[field].flatten(1).numpy().view(np.uint8) for field in asked}
    return Buffer(PairBatch(**tensors), rows)


def _memory(num_bytes: int, pin: bool) -> Tensor:
    if pin or num_bytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin)
    # In pages of 4 kB, the first use of an epoch's buffers takes as long as reading a thousand pairs; and the heap
    # would keep holes of such sizes.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
