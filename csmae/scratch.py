"""Temporary folders that a kill cannot leave behind for good.

Each folder is locked itself, without a file in it, and the operating system drops the lock with the process. Whoever needs such a folder next removes those
that nobody holds any more.
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


def scratch_root() -> Path:
    """The place of this account's temporary folders on this machine.

    Raises:
        ConfigError: It cannot be made, or somebody else made it.
    """
    root = Path(tempfile.gettempdir()) / f"csmae-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.lstat().st_uid
    except OSError as error:
        raise ConfigError(f"{root}: cannot be written: {error.strerror}: set TMPDIR to a folder that can") from None
    if owner != os.getuid() or root.is_symlink():
        raise ConfigError(f"{root}: belongs to another account: set TMPDIR to a folder of your own")
    return root


@contextmanager
def scratch(prefix: str, root: Path | None = None) -> Iterator[Path]:
    """A new folder for as long as the block lasts; those of the same kind whose process is dead are removed.

    Args:
        prefix: What its name begins with.
        root: Where; this machine's temporary folder where None. Other machines may share it: each removes its own only.
    """
    if root:
        prefix = f"{prefix}-{socket.gethostname()}"
    root = root or scratch_root()
    clear(root, f"{prefix}-")
    with _alone(root):
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=root))
        lock = _opened(folder)
        _locked(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
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
            lock = _opened(folder)
            if _locked(lock) is not False:
                return lock
            os.close(lock)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder}: another process uses it")
        beat()
        time.sleep(RETRY_S)


def clear(root: Path, prefix: str, keep: Callable[[Path], bool] = lambda folder: False) -> None:
    """Remove the folders that no process holds.

    Args:
        root: Where they are.
        prefix: What their names begin with.
        keep: Whether one must stay all the same.
    """
    with _alone(root):
        for folder in [path for path in root.iterdir() if path.name.startswith(prefix) and path.is_dir()]:
            with suppress(OSError):
                lock = _opened(folder)
                try:
                    if _locked(lock) and not keep(folder):
                        shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Nobody else makes or removes folders meanwhile: one that is being made has no lock yet."""
    lock = _opened(root)
    try:
        with suppress(OSError):  # a file system without locks, on which nothing is removed
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _locked(lock: int) -> bool | None:
    """Whether a lock could be had; None on a file system without locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
