"""Values of an LMDB by position: the index of its keys, and the file mapped into memory."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.data.formats.layout import ArchiveError, DamagedValueError
from csmae.data.formats.lmdb_index import read_index

MAX_VALUE = 1024 * 1024
"""Bytes; the largest real value has 278,000."""

_TOLD_AHEAD = hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_RANDOM")
"""Whether the system takes hints; where not, it guesses what will be read."""

_AHEAD = 64
"""Values that are announced at a time."""


class Store:
    """An open LMDB; may be read from several threads.

    Mapped, for copying out of the system's cache costs three times less than ``pread``. A mapped file that becomes
    shorter would kill the process (SIGBUS), so its size is looked at before every value.

    Args:
        folder: Holds ``data.mdb``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.labels: dict[int, NDArray[np.bool_]] = {}
        """Classes by position, for those values that were asked."""
        self._descriptor = os.open(folder / "data.mdb", os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        if _TOLD_AHEAD:
            # Or the system reads megabytes around each place, which are gone again where the archive exceeds the memory.
            self._map.madvise(mmap.MADV_RANDOM)
        self._content = np.frombuffer(self._map, np.uint8)

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Positions of keys; -1 where there is none."""
        return self.index.find(keys)

    def in_file_order(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which the values at these positions lie in the file: kind to a cold disk."""
        return np.argsort(self.index.offsets[positions])

    def expect(self, positions: NDArray[np.int64]) -> None:
        """Let the system fetch values that will be read soon, many at a time, where it can.

        A value that was not announced comes page by page, twenty times slower.
        """
        if _TOLD_AHEAD:
            places = zip(self.index.offsets[positions].tolist(), self.index.sizes[positions].tolist(), strict=True)
            for offset, size in places:
                os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def announced(self, positions: NDArray[np.int64]) -> Iterator[int]:
        """These positions one by one, their values expected a good while ahead."""
        self.expect(positions[:_AHEAD])
        for start in range(0, len(positions), _AHEAD):
            self.expect(positions[start + _AHEAD : start + 2 * _AHEAD])
            yield from positions[start : start + _AHEAD].tolist()

    def read(self, position: int) -> NDArray[np.uint8]:
        """The bytes of a value, in the file's own pages.

        Raises:
            DamagedValueError: The value is absurdly long, or the file became shorter.
        """
        offset, size = int(self.index.offsets[position]), int(self.index.sizes[position])
        if size > MAX_VALUE:
            raise DamagedValueError(f"{size} bytes are no patch (at most {MAX_VALUE})")
        if offset + size > min(os.fstat(self._descriptor).st_size, len(self._content)):
            raise DamagedValueError("the file became shorter since it was opened")
        return self._content[offset : offset + size]

    def key(self, position: int) -> str:
        """The key at a position."""
        return bytes(self.index.keys[position]).decode(errors="replace")


def open_store(folder: Path) -> Store:
    """The store of a folder; one a process and version of the file, for the index of a large archive takes a second.

    Raises:
        ArchiveError: The file cannot be read, is truncated or damaged.
    """
    try:
        state = (folder / "data.mdb").stat()
    except OSError as error:
        raise ArchiveError(
            f"{folder / 'data.mdb'}: cannot be read: {error.strerror}: let this account read it"
        ) from None
    return _open(folder.resolve(), state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _open(folder: Path, *_state: int) -> Store:
    return Store(folder)
