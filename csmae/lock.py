"""File locks between processes. The operating system drops them with their process, so a kill leaves none behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from csmae.config import ConfigError

DRIVER_LOCK = "driver.lock"
"""Lock file of the driver in a study's folder; it contains the driver's process id."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks, such as Lustre without its option flock."""


def describe_write_error(path: str | Path, error: OSError) -> str:
    """Explain why a storage cannot be used, and what to do.

    Args:
        path: File or folder that cannot be written.
        error: From the operating system.
    """
    if error.errno in NO_LOCKS:
        return (
            f"--storage: the file system of {path} has no locks ({error.strerror}): name a folder on another one or a bucket "
            "(s3://…, gs://…), or mount it with locks (Lustre: -o flock; NFS: with its lock daemon)"
        )
    remedy = (
        "free some space there"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "name a folder that this account may write"
    )
    return f"--storage: {path} cannot be written: {error.strerror}: {remedy}"


@contextmanager
def database_lock(database: Path) -> Iterator[None]:
    """Lock a database file while it is opened: the first process to open it creates its tables.

    Args:
        database: The lock is an empty file beside it, which stays. A database that exists is opened without the lock where
            its folder is read-only or its file system has no locks.

    Raises:
        OSError: There is no database, and none can be created.
    """
    lock = FileLock(database.with_name(f".{database.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS and not database.exists():
            raise
    try:
        yield
    finally:
        lock.release()


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Lock a study's folder for this driver.

    Raises:
        ConfigError: Another process holds the lock, or the folder cannot be written.
    """
    path = folder / DRIVER_LOCK
    try:
        lock = FileLock(path, fallback_to_soft=False, on_acquired=_write_process_id).acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"study {folder.name!r} is being run by {_holder(path)}: "
            "wait until it ends, or use --name to start another study"
        ) from None
    except OSError as error:
        raise ConfigError(describe_write_error(error.filename or path, error)) from None
    with lock:
        yield


def _holder(path: Path) -> str:
    try:
        number = path.read_text()
    except OSError:
        number = ""
    return f"process {number}" if number else "another process"


def _write_process_id(lock: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
