"""The storage of all studies: a folder, or a bucket of which the driver keeps a copy."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from csmae.config import ConfigError
from csmae.lock import only_driver
from csmae.scratch import scratch
from csmae.storage.layout import DATABASE
from csmae.storage.manifest import DRIVER, Claim, Files, RemoteFolder, SupersededError
from csmae.storage.object_store import ACCESS, SCHEMES, ObjectStore, reason
from csmae.storage.unreferenced import remove_unreferenced

EVERY_S = 20.0
"""Between looks at what changed; what the loss of the driver's machine may cost."""

LEASE_S = 120.0
"""HeartbeatTimeout of a driver on another machine after which it counts as dead."""

CLEAR_EVERY_S = 24 * 3600.0
"""Between looks at what killed writers left in the bucket."""

DRAFT_S = 3600.0
"""Age at which a file that is not whole is of a process that was killed."""

CLOSE_S = 60.0

COPIES = Path("runs")
"""Where copies of buckets are kept."""

OWNER = ".owner"
"""The file in a copy that tells it from copies on other machines."""

NOTES = ("driver.lock",)
"""Files of this machine alone."""

log = logging.getLogger(__name__)


def local(where: str) -> Path:
    """The folder that stands for a storage on this machine: itself, or the copy of a bucket.

    Raises:
        ConfigError: The URL is of no bucket, or holds a password, which would be shown and logged.
    """
    if not where.startswith(SCHEMES):
        if "://" in where:
            raise ConfigError(f"--storage {where}: must be a folder, s3://BUCKET/… or gs://BUCKET/…")
        return Path(where)
    if "@" in where or "secret_key" in where:
        raise ConfigError(
            "--storage: holds a password, which would be shown and logged: leave it out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    bucket, name = where.partition("?")[0].rstrip("/"), _plain(where)
    if re.search(r"[^\w./]", bucket.partition("://")[2]):  # `s3://a/b` and `s3://a-b` are not the same bucket
        name += f"-{hashlib.sha256(bucket.encode()).hexdigest()[:6]}"
    return COPIES / name


def _plain(where: str) -> str:
    """A bucket's URL as the name of a folder, which other buckets may have as well."""
    return re.sub(r"[^\w.-]+", "-", where.partition("?")[0].rstrip("/"))


def _old_copy(where: str, files: RemoteFolder) -> Path | None:
    """The copy that version 0.1.0 made of a bucket, under a name that several buckets could have.

    Returns:
        None where there is none, or it is another bucket's, or there is one of this version.

    Raises:
        OSError: The bucket does not answer.
    """
    old = COPIES / _plain(where)
    if local(where).exists() or not (old / OWNER).exists():
        return None
    return old if files.manifest().note.get("owner") == _owner(old) else None


def place(where: str) -> Path | ObjectStore:
    """What all nodes must share.

    Raises:
        ConfigError: The bucket cannot be used.
    """
    folder = local(where)
    if not where.startswith(SCHEMES):
        return folder
    bucket = ObjectStore(where)
    bucket.check()
    return bucket


@contextmanager
def opened(where: str) -> Iterator[Files | None]:
    """Keep a storage open for a driver.

    Args:
        where: A folder, or a URL.

    Yields:
        Where the trials' files are; None where they are in the folder.

    Raises:
        ConfigError: The bucket cannot be used, or a driver on another machine uses it.
    """
    if not where.startswith(SCHEMES):
        yield None
        return
    folder, bucket = local(where).absolute(), ObjectStore(where)
    bucket.check()
    files = RemoteFolder(bucket, DRIVER)
    _rename_old_copy(where, files)
    with only_driver(folder):
        mirror = StudyMirror(files, folder)
        claim = mirror.transfer_trials()
        mirror.start()
        try:
            yield Files(bucket, folder, claim)
        finally:
            mirror.close()


def _rename_old_copy(where: str, files: RemoteFolder) -> None:
    try:
        if old := _old_copy(where, files):
            with only_driver(old):
                old.rename(local(where))
    except OSError as error:
        raise ConfigError(f"--storage {where}: {reason(error)}: {ACCESS}") from None


def fetched(where: str) -> Path:
    """The folder that stands for a storage, with what a bucket holds of its studies, for looking only.

    Raises:
        ConfigError: The bucket cannot be used.
    """
    folder = local(where)
    if where.startswith(SCHEMES):
        bucket = ObjectStore(where)
        bucket.check()
        files = RemoteFolder(bucket, DRIVER)
        try:
            folder = _old_copy(where, files) or folder
            state = files.manifest()
            if state.note.get("owner") != _owner(folder):
                files.fetch(folder, state)
        except OSError as error:
            raise ConfigError(f"--storage {where}: {reason(error)}: {ACCESS}") from None
    return folder


class StudyMirror(threading.Thread):
    """Sends the database of studies and the studies' own files to a bucket, now and then and at the end.

    Args:
        files: In the bucket.
        folder: The driver's copy.
    """

    def __init__(self, files: RemoteFolder, folder: Path) -> None:
        super().__init__(name="mirror", daemon=True)
        self._files, self._folder, self._closing = files, folder, threading.Event()
        self._claim: Claim | None = None
        self._told = False

    def transfer_trials(self) -> Claim:
        """Bring the copy up to the bucket, where another machine's driver was the last to write to it.

        Returns:
            The right to drive, which another driver may take away after a long silence of this one.

        Raises:
            ConfigError: That driver is still at it, or the bucket fails.
        """
        try:
            owner, note = _owner(self._folder), self._files.manifest().note
            if note and note["owner"] != owner and note["open"] and (age := time.time() - note["time"]) < LEASE_S:
                raise ConfigError(
                    f"--storage {self._files.bucket.url}: {note['who']} runs a search on it, and was heard of {age:.0f} s "
                    f"ago: wait for its end, or {LEASE_S:.0f} s after its machine is gone"
                )
            self._claim = self._files.claim()
            self._catch_up(owner)
            self._push(True)
        except OSError as error:
            raise ConfigError(f"--storage {self._files.bucket.url}: {reason(error)}: {ACCESS}") from None
        return self._claim

    def _catch_up(self, owner: str) -> None:
        """Bring the copy to the state that was claimed, unless this copy is where it came from."""
        assert self._claim
        state = self._claim.state
        for draft in self._folder.rglob(".*.[0-9]*"):  # see ``ObjectStore.get``
            if time.time() - draft.stat().st_mtime > DRAFT_S:
                draft.unlink()
        if state.note and state.note["owner"] != owner:
            for path in (self._folder / name for name in _names(self._folder)):
                path.unlink()  # of a search that another machine took over since
            self._files.fetch(self._folder, state)
        elif not (self._folder / DATABASE).exists():
            self._files.fetch(self._folder, state)

    def run(self) -> None:
        """Send until closed, or until another driver took the storage over."""
        cleared, clearing = -CLEAR_EVERY_S, threading.Thread()
        while not self._closing.wait(EVERY_S) and not self._lost:
            if self._try(True) and time.monotonic() - cleared > CLEAR_EVERY_S and not clearing.is_alive():
                cleared = time.monotonic()
                clearing = threading.Thread(target=self._clear, name="leftovers", daemon=True)
                clearing.start()  # a bucket may hold many: the lease must be renewed meanwhile

    def _clear(self) -> None:
        try:
            remove_unreferenced(self._files.bucket, lambda: self._closing.is_set() or self._lost)
        except OSError as error:
            if not self._closing.is_set():
                log.warning(
                    "%s: leftovers of killed processes were not removed: %s", self._files.bucket.url, reason(error)
                )

    @property
    def _lost(self) -> bool:
        return bool(self._claim and self._claim.lost)

    def close(self) -> None:
        """Send the last, for a while; nothing where another driver took the storage over."""
        self._closing.set()
        self.join()
        if self._lost:
            return
        deadline = time.monotonic() + CLOSE_S
        while not self._try(False):
            if time.monotonic() > deadline:
                log.warning(
                    "what %s has yet to get waits in %s for the next start", self._files.bucket.url, self._folder
                )
                return
            time.sleep(1)

    def _try(self, is_open: bool) -> bool:
        """Send; whether nothing is left to be sent."""
        try:
            self._push(is_open)
        except SupersededError as error:
            if not is_open:  # else the search says so as it ends
                log.warning("%s", error)
            return True
        except (OSError, sqlite3.Error) as error:
            if not self._told:
                log.warning("%s: %s; the search goes on", self._files.bucket.url, reason(error))
            self._told = True
            return False
        if self._told:
            log.warning("%s answers again", self._files.bucket.url)
        self._told = False
        return True

    def _push(self, is_open: bool) -> None:
        who = f"process {os.getpid()} on {socket.gethostname()}"
        note: dict[str, Any] = {"owner": _owner(self._folder), "who": who, "time": time.time(), "open": is_open}
        assert self._claim
        with scratch("driver") as copy:
            _copy(self._folder, copy)
            self._claim.push(copy, note)


def _owner(folder: Path) -> str:
    """The name of a copy."""
    path = folder / OWNER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text()


def _names(folder: Path) -> list[str]:
    """The database, and the files directly in each study's folder."""
    found = [path for path in (folder / DATABASE, *sorted(folder.glob("*/*"))) if path.is_file()]
    kept = (path for path in found if path.name not in NOTES and not path.name.startswith("."))
    return [path.relative_to(folder).as_posix() for path in kept if path.suffix != ".new"]


def _copy(folder: Path, target: Path) -> None:
    """Files as they are at one moment each; the database through SQLite, for it may be in the middle of something."""
    for name in _names(folder):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        written = (folder / name).stat().st_mtime_ns  # before it is read: what comes after will be sent again
        if name == DATABASE:
            with closing(sqlite3.connect(folder / name)) as source, closing(sqlite3.connect(path)) as copy:
                source.backup(copy)
        else:
            shutil.copyfile(folder / name, path)
        os.utime(path, ns=(written, written))
