"""Values of an LMDB, read by position: a file, the index of its keys, one ``pread`` a value."""

from __future__ import annotations

import os
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from csmae.data.index import read_index
from csmae.data.layout import ArchiveError, DamagedValueError

MAX_VALUE = 4 * 1024 * 1024
"""Bytes; the largest real value has 278,000."""


class Store:
    """An open LMDB; may be read from several threads.

    Args:
        folder: Holds ``data.mdb``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._descriptor = os.open(folder / "data.mdb", os.O_RDONLY)
        self.labels: dict[int, NDArray[np.bool_]] = {}
        weakref.finalize(self, os.close, self._descriptor)

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Positions of keys; -1 where there is none."""
        return self.index.find(keys)

    def in_file_order(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which the values at these positions lie in the file: kind to a cold disk."""
        return np.argsort(self.index.offsets[positions])

    def read(self, position: int, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Read a value.

        Args:
            position: Of its key in the index.
            memory: At least ``MAX_VALUE`` bytes that are written over.

        Returns:
            The bytes of the value, a part of ``memory``.

        Raises:
            DamagedValueError: The value is absurdly long, or the disk does not give it.
        """
        size = int(self.index.sizes[position])
        if size > MAX_VALUE:
            raise DamagedValueError(f"{size} bytes are no patch (at most {MAX_VALUE})")
        value = memory[:size]
        try:
            found = os.preadv(self._descriptor, [value.data], int(self.index.offsets[position]))
        except OSError as error:
            raise DamagedValueError(f"cannot be read: {error.strerror}") from None
        if found != size:
            raise DamagedValueError(f"the file became shorter: read {found} of {size} bytes")
        return value

    def head(self, position: int, num_bytes: int) -> bytes:
        """The first bytes of a value."""
        size = min(num_bytes, int(self.index.sizes[position]))
        return os.pread(self._descriptor, size, int(self.index.offsets[position]))

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
        raise ArchiveError(f"{folder / 'data.mdb'}: cannot be read: {error.strerror}") from None
    return _open(folder.resolve(), state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _open(folder: Path, *_state: int) -> Store:
    return Store(folder)
