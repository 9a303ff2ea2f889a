"""Temporary folders that a kill cannot leave behind for good.

The process that uses a folder locks a file beside it, ``.NAME.lock``, and the operating system drops the lock with the process.
Whoever needs such a folder next removes those that nobody holds any more. NFS locks only files that are open for writing, which
a folder cannot be.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from csmae.config import ConfigError

RETRY_S = 0.2

LOCK = ".lock"
"""SearchEnd of the names of lock files."""


def scratch_root() -> Path:
    """The place of this account's temporary folders on this machine.

    Raises:
        ConfigError: It cannot be made, or somebody else made it.
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
    """The error of a temporary folder that cannot be written, or None where no place for one was found."""
    found = f"{folder}: cannot be written: {error.strerror}" if folder else error.strerror
    return ConfigError(f"{found}: set TMPDIR to a folder with free space that this account may write")


@contextmanager
def scratch(prefix: str, root: Path | None = None, shared: bool = True) -> Iterator[Path]:
    """A new folder for as long as the block lasts; those of the same kind whose process is dead are removed.

    Args:
        prefix: What its name begins with.
        root: Where; this machine's temporary folder where None.
        shared: Whether other machines may share ``root``: each removes its own folders only.
    """
    if root and shared:
        prefix = f"{prefix}-{socket.gethostname()}"
    root = root or scratch_root()
    clear(root, f"{prefix}-")
    with _alone(root):
        # The lock comes first, so that an account that shares the root never meets a folder without one.
        lock, name = tempfile.mkstemp(LOCK, f".{prefix}-", root)
        _locked(lock)
    folder = root / Path(name).name.removeprefix(".").removesuffix(LOCK)
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def hold(folder: Path, beat: Callable[[], object], patience_s: float) -> int:
    """Keep a folder, made where it does not exist, for this process.

    Args:
        folder: Its parent holds such folders only.
        beat: Called while another process holds it.
        patience_s: For so long at most.

    Returns:
        The lock's file descriptor; the folder is held until it is closed.

    Raises:
        TimeoutError: Another process still holds it.
    """
    deadline = time.monotonic() + patience_s
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent):
            folder.mkdir(exist_ok=True)
            lock = _opened(_lock_path(folder))
            if _locked(lock) is not False:
                return lock
            os.close(lock)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder}: another process uses it")
        beat()
        time.sleep(RETRY_S)


def clear(root: Path, prefix: str, keep: Callable[[Path], bool] = lambda folder: False) -> None:
    """Remove the folders that no process holds, and their locks.

    Args:
        root: Where they are.
        prefix: What their names begin with.
        keep: Whether one must stay all the same.
    """
    with _alone(root):
        for folder in _folders(root, prefix):
            with suppress(OSError):
                lock = _opened(_lock_path(folder))
                try:
                    if _locked(lock) and not (folder.exists() and keep(folder)):
                        _remove(folder)
                finally:
                    os.close(lock)


def _folders(root: Path, prefix: str) -> list[Path]:
    """Folders with such names, and those of which there is only the lock."""
    names = [path.name for path in root.iterdir()]
    locks = [name.removeprefix(".").removesuffix(LOCK) for name in names if name.endswith(LOCK) and name[0] == "."]
    found = {name for name in names if (root / name).is_dir()} | set(locks)
    return [root / name for name in sorted(found) if name.startswith(prefix)]


def _remove(folder: Path) -> None:
    """Remove a folder that this process holds, and its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        with suppress(OSError):
            _lock_path(folder).unlink()


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Nobody else of this account makes or removes folders meanwhile."""
    path = root / f".csmae-lock-{os.getuid()}"
    while True:
        lock = _opened(path)
        with suppress(OSError):  # a file system without locks, on which nothing is removed
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_at(path, lock):
            break
        os.close(lock)  # its last holder has removed it
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(lock)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{LOCK}")


def _opened(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _is_at(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(lock))
    except OSError:
        return False


def _locked(lock: int) -> bool | None:
    """Whether a lock could be had; None on a file system without locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
