"""The threads of numpy's BLAS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np  # noqa: F401  # its BLAS must be loaded to be found
from threadpoolctl import ThreadpoolController

_CONTROLLER = ThreadpoolController().select(user_api="blas")

_LOCK = threading.Lock()


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Limit numpy's BLAS to the calling thread: its other threads wait busily, and so keep the cores from torch's or our own.

    The setting belongs to the process. If two threads changed it at the same time, the second one would restore the first
    one's limit; so it changes nothing.
    """
    if not _LOCK.acquire(blocking=False):
        yield
        return
    try:
        with _CONTROLLER.limit(limits=1):
            yield
    finally:
        _LOCK.release()
