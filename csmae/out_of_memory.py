"""Recognize out-of-memory errors, and retry work with smaller sizes until it fits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

MESSAGES = (
    "out of memory",  # CUDA's driver, NCCL
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
    "ALLOC_FAILED",  # cuBLAS, cuDNN
    "could not create a primitive",  # oneDNN, which gives no reason
)
"""Parts of the messages with which the libraries below torch raise a plain ``RuntimeError``."""

log = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a GPU or of the machine is too small."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def retry_with_half(work: Callable[[int], T], size: int, name: str) -> tuple[T, int]:
    """Call ``work(size)``; each time it runs out of memory, halve the size and call it again.

    Args:
        work: Called with the size.
        size: First size to try.
        name: Name of the work in the log, such as ``scoring``.

    Returns:
        The result of ``work`` and the size that fits.

    Raises:
        RuntimeError, MemoryError: A size of 1 does not fit, see ``is_out_of_memory``.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Not in the except block: there the error still holds the tensors of its frames.
        size //= 2
        log.warning("out of memory: %s continues with batches of %d", name, size)
