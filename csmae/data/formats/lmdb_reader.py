"""Reads the values of an LMDB by position: an index of its keys, and the file mapped into memory."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.data.errors import ArchiveError, DamagedValueError
from csmae.data.formats.lmdb_index import read_index

MAX_VALUE_BYTES = 1024 * 1024
"""The largest real value has 278,000 bytes."""

_HAS_READ_HINTS = hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_RANDOM")
"""Whether the system takes hints on what will be read; without them it guesses."""

_PREFETCH = 64
"""Values that ``iter_prefetched`` requests at a time."""


class LmdbReader:
    """An open LMDB; may be read from several threads.

    The file is mapped because copying from the system's cache costs a third of ``pread``. A mapped file that shrinks would
    kill the process (SIGBUS), so its size is checked before every value.

    Args:
        folder: Holds ``data.mdb``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.labels: dict[int, NDArray[np.bool_]] = {}
        """Classes by position, for the values whose labels were read."""
        self._descriptor = os.open(folder / "data.mdb", os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        if _HAS_READ_HINTS:
            # Otherwise the system reads megabytes around each value; an archive larger than the memory evicts them unused.
            self._map.madvise(mmap.MADV_RANDOM)
        self._content = np.frombuffer(self._map, np.uint8)

    def file_order(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the order that sorts positions by the offset of their values, which suits a disk."""
        return np.argsort(self.index.offsets[positions])

    def prefetch(self, positions: NDArray[np.int64]) -> None:
        """Let the system read values in the background, many at a time, if it can.

        A value that was not prefetched is read page by page, twenty times slower.
        """
        if _HAS_READ_HINTS:
            extents = zip(self.index.offsets[positions].tolist(), self.index.sizes[positions].tolist(), strict=True)
            for offset, size in extents:
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def iter_prefetched(self, positions: NDArray[np.int64]) -> Iterator[int]:
        """Yield the positions one by one; their values are prefetched well ahead."""
        self.prefetch(positions[:_PREFETCH])
        for start in range(0, len(positions), _PREFETCH):
            self.prefetch(positions[start + _PREFETCH : start + 2 * _PREFETCH])
            yield from positions[start : start + _PREFETCH].tolist()

    def read(self, position: int) -> NDArray[np.uint8]:
        """Return the bytes of a value without copying them.

        Raises:
            DamagedValueError: The value is too large, or the file has shrunk.
        """
        offset, size = int(self.index.offsets[position]), int(self.index.sizes[position])
        if size > MAX_VALUE_BYTES:
            raise DamagedValueError(f"{size} bytes are too many for a patch (at most {MAX_VALUE_BYTES})")
        if offset + size > min(os.fstat(self._descriptor).st_size, len(self._content)):
            raise DamagedValueError("the file has shrunk since it was opened")
        return self._content[offset : offset + size]

    def key(self, position: int) -> str:
        """Return the key at a position."""
        return bytes(self.index.keys[position]).decode(errors="replace")


def open_lmdb(folder: Path) -> LmdbReader:
    """Open an LMDB; cached by process and version of the file, because the index of a large archive takes a second.

    Raises:
        ArchiveError: The file cannot be read, is truncated or damaged.
    """
    try:
        state = (folder / "data.mdb").stat()
    except OSError as error:
        raise ArchiveError(
            f"{folder / 'data.mdb'}: cannot be read: {error.strerror}: grant this account read access"
        ) from None
    return _open(folder.resolve(), state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _open(folder: Path, *_state: int) -> LmdbReader:
    return LmdbReader(folder)
