"""File locks between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opening(database: Path) -> Iterator[None]:
    """Hold the lock of a database file while it is opened, for whoever opens it first makes its tables.

    Args:
        database: The lock is an empty file beside it, which stays. A database in a folder that this process may only read
            was made before, and is opened without a lock.

    Raises:
        OSError: There is no database, and none can be made.
    """
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(database.with_name(f".{database.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        if not database.exists():
            raise
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
