"""Which errors mean that memory is too small, and work that is halved until it fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

TEXTS = (
    "out of memory",  # CUDA's driver, NCCL
    "can't allocate memory",  # torch's allocator on CPUs
    "not enough memory",  # the same on Windows
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "could not create a primitive",  # oneDNN, which names no reason
)
"""What libraries that torch calls say in a plain ``RuntimeError``."""

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU's or the machine's memory is too small."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


def halved_until_it_fits(work: Callable[[int], T], size: int, what: str) -> tuple[T, int]:
    """Call a function with a size; where memory is too small, again with half of it, down to 1.

    Args:
        work: Takes the size.
        size: To begin with.
        what: Named in the log, such as ``scoring``.

    Returns:
        What ``work`` returned, and with which size.

    Raises:
        RuntimeError, MemoryError: The memory is too small for a size of 1, see ``is_out_of_memory``.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Only here has the error let go of the tensors that its frames held.
        size //= 2
        log.warning("out of memory: %s goes on with %d at a time", what, size)
