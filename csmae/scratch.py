"""Temporary folders that a kill cannot leave behind for good.

The process that uses a folder locks a file beside it, ``.NAME.lock``, and the operating system drops the lock with the
process. Whoever needs such a folder next removes those that are not locked. The lock is not the folder itself because NFS
locks only files that are open for writing.

A lock is taken before its folder is created and removed after it, always by the process that holds it. So a process that
gets a lock checks that the lock still has its name: its former holder may have removed it in the meantime.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from csmae.config import ConfigError
from csmae.lock import NO_LOCKS

RETRY_INTERVAL_S = 0.2

LOCK_SUFFIX = ".lock"

MAX_NAMES = 100
"""Attempts to lock a new name: a file system that refuses locks answers each of them as if another process held it."""


def scratch_root() -> Path:
    """Return the folder that holds this account's temporary folders on this machine.

    Raises:
        ConfigError: It cannot be created, or belongs to another account.
    """
    try:
        root = Path(tempfile.gettempdir()) / f"csmae-{os.getuid()}"
    except OSError as error:  # none of the usual places
        raise unwritable_scratch(None, error) from None
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.lstat().st_uid
    except OSError as error:
        raise unwritable_scratch(root, error) from None
    if owner != os.getuid() or root.is_symlink():
        raise ConfigError(f"{root}: belongs to another account: set TMPDIR to a folder of your own")
    return root


def unwritable_scratch(folder: Path | None, error: OSError) -> ConfigError:
    """Return the error for a temporary folder that cannot be written; None where no place for one was found."""
    found = f"{folder}: cannot be written: {error.strerror}" if folder else error.strerror
    return ConfigError(f"{found}: set TMPDIR to a folder with free space that this account may write")


@contextmanager
def scratch(prefix: str, root: Path | None = None, shared: bool = True) -> Iterator[Path]:
    """Create a folder for as long as the block lasts, and remove those with the same prefix whose process is dead.

    Args:
        prefix: Beginning of its name.
        root: Folder to create it in; None is this machine's temporary folder.
        shared: Whether other machines may share ``root``: each removes only its own folders.
    """
    if root and shared:
        prefix = f"{prefix}-{socket.gethostname()}"
    root = root or scratch_root()
    remove_unused(root, f"{prefix}-")
    folder, lock = _new_folder(root, prefix)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder)
        lock.release()


def _new_folder(root: Path, prefix: str) -> tuple[Path, FileLock]:
    """Choose a name and lock it."""
    for _ in range(MAX_NAMES):
        folder = root / f"{prefix}-{secrets.token_hex(4)}"
        with suppress(Timeout):  # another process is removing unused folders
            return folder, _lock(folder)
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def hold(folder: Path, heartbeat: Callable[[], object], timeout_s: float) -> FileLock:
    """Lock a folder for this process, and create it if it does not exist.

    Args:
        folder: Its parent holds only such folders.
        heartbeat: Called while another process holds the lock.
        timeout_s: Longest wait for that process.

    Returns:
        The lock; the folder is held until it is released.

    Raises:
        TimeoutError: Another process still holds it.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            lock = _lock(folder)
            folder.mkdir(exist_ok=True)
            return lock
        except Timeout:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{folder}: another process uses it") from None
        heartbeat()
        time.sleep(RETRY_INTERVAL_S)


def remove_unused(root: Path, prefix: str, keep: Callable[[Path], bool] = lambda folder: False) -> None:
    """Remove the folders that no process holds, and their locks; none on a file system without locks.

    Args:
        root: Folder that contains them.
        prefix: Beginning of their names.
        keep: Returns whether a folder must stay although it is unused.
    """
    for path in sorted(root.glob(f".{glob.escape(prefix)}*{LOCK_SUFFIX}")):
        folder = root / path.name[1:].removesuffix(LOCK_SUFFIX)
        with suppress(OSError):  # such as Timeout: another process holds it
            lock = _lock(folder)
            try:
                if lock.is_locked and not (folder.exists() and keep(folder)):
                    _remove(folder)
            finally:
                lock.release()


def _remove(folder: Path) -> None:
    """Remove a folder that this process holds, and its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        with suppress(OSError):
            _lock_path(folder).unlink()


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{LOCK_SUFFIX}")


def _lock(folder: Path) -> FileLock:
    """Take a folder's lock, or none on a file system without locks.

    Raises:
        Timeout: Another process holds it, or has just removed it.
        OSError: The lock cannot be created.
    """
    path = _lock_path(folder)

    def require_name(descriptor: int) -> None:
        try:
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return
        except FileNotFoundError:
            pass
        raise Timeout(str(path))

    # Not thread-local: the thread that ends an upload releases the lock of the thread that trained.
    lock = FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False, on_acquired=require_name)
    try:
        lock.acquire(blocking=False)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock
