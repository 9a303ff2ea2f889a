"""File locks between processes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csmae.config import ConfigError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer, such as Lustre without its option flock."""


def unwritable(path: str | Path, error: OSError) -> str:
    """Why a storage cannot be used, and what to do.

    Args:
        path: Of the file or folder that should be written.
        error: What the operating system says.
    """
    if error.errno in NO_LOCKS:
        return (
            f"--storage: the file system of {path} has no locks ({error.strerror}): name a folder on another one or a bucket "
            "(s3://…, gs://…), or mount it with locks (Lustre: -o flock; NFS: with its lock daemon)"
        )
    remedy = (
        "make room there"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "name a folder that this account may write"
    )
    return f"--storage: {path} cannot be written: {error.strerror}: {remedy}"


@contextmanager
def opening(database: Path) -> Iterator[None]:
    """Hold the lock of a database file while it is opened, for whoever opens it first makes its tables.

    Args:
        database: The lock is an empty file beside it, which stays. A database in a folder that this process may only read
            was made before, and is opened without a lock; so is one on a file system without locks.

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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(lock)


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the study's folder for this process.

    Raises:
        ConfigError: Another process has it.
    """
    path = folder / "driver.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(unwritable(error.filename, error)) from None
    try:
        _sign(lock, path)
        yield
    finally:
        os.close(lock)


def _sign(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    except BlockingIOError:
        raise ConfigError(
            f"study {path.parent.name!r} is being run by process {path.read_text()}: "
            "wait for its end, or use --name to begin another study"
        ) from None
    except OSError as error:
        raise ConfigError(unwritable(path, error)) from None
