"""The storage of all studies: a folder, or a bucket of which the driver keeps a local copy."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from csmae.atomic import DRAFTS
from csmae.config import ConfigError
from csmae.lock import DRIVER_LOCK, driver_lock
from csmae.scratch import scratch
from csmae.storage.layout import DATABASE
from csmae.storage.manifest import (
    DRIVER,
    Claim,
    Manifest,
    RemoteFolder,
    RemoteStorage,
    SupersededError,
    this_process,
)
from csmae.storage.object_store import SCHEMES, ObjectStore, describe_error, unusable_storage
from csmae.storage.unreferenced import remove_unreferenced

UPLOAD_INTERVAL_S = 20.0
"""Time between uploads: what is lost with the driver's machine."""

LEASE_S = 120.0
"""Silence of a driver on another machine after which it is presumed dead."""

CLEANUP_INTERVAL_S = 24 * 3600.0
"""Time between removals of what killed writers left in the bucket."""

STALE_DRAFT_S = 3600.0
"""Age at which a draft belongs to a process that was killed."""

CLOSE_TIMEOUT_S = 60.0
"""Time for the last upload when a search ends."""

COPIES = Path("runs")
"""Folder of the local copies of buckets."""

COPY_ID = ".copy-id"
"""File in a local copy with a random name, which distinguishes it from copies on other machines."""

log = logging.getLogger(__name__)


def local_folder(storage: str) -> Path:
    """Return the folder for a storage on this machine: the storage itself, or the local copy of a bucket.

    Args:
        storage: A folder or a bucket's URL.

    Raises:
        ConfigError: The URL is not a bucket's, or contains a password, which would be shown and logged.
    """
    if not storage.startswith(SCHEMES):
        if "://" in storage:
            raise ConfigError(f"--storage {storage}: must be a folder, s3://BUCKET/… or gs://BUCKET/…")
        return Path(storage)
    if "@" in storage or "secret_key" in storage:
        raise ConfigError(
            "--storage: contains a password, which would be shown and logged: leave it out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    bucket = storage.partition("?")[0].rstrip("/")
    name = re.sub(r"[^\w.-]+", "-", bucket)
    if re.search(r"[^\w./]", bucket.partition("://")[2]):  # `s3://a/b` and `s3://a-b` are different buckets
        name += f"-{hashlib.sha256(bucket.encode()).hexdigest()[:6]}"
    return COPIES / name


def shared_store(storage: str) -> ObjectStore:
    """Return the storage that all nodes must share; errors are those of ``ObjectStore.check`` and ``local_folder``."""
    folder = local_folder(storage)
    if not storage.startswith(SCHEMES):
        return ObjectStore(str(folder.absolute()))
    store = ObjectStore(storage)
    store.check()
    return store


@contextmanager
def driver_storage(storage: str) -> Iterator[RemoteStorage | None]:
    """Prepare a storage for a driver, and mirror its files for as long as the block lasts.

    Args:
        storage: A folder or a bucket's URL.

    Yields:
        The bucket with the trials' files; None if they are in the folder itself.

    Raises:
        ConfigError: The bucket cannot be used, or a driver on another machine uses it.
    """
    store, folder = shared_store(storage), local_folder(storage).absolute()
    if store.folder:
        yield None
        return
    with driver_lock(folder):
        claim = _claim_bucket(RemoteFolder(store, DRIVER), folder)
        mirror = StudyMirror(claim, folder)
        mirror.start()
        try:
            yield RemoteStorage(store, folder, claim)
        finally:
            mirror.close()


def fetch_studies(storage: str) -> Path:
    """Return the folder for a storage, after downloading a bucket's studies for reading.

    Raises:
        ConfigError: The bucket cannot be used.
    """
    store, folder = shared_store(storage), local_folder(storage)
    if store.folder:
        return folder
    remote = RemoteFolder(store, DRIVER)
    try:
        manifest = remote.manifest()
        if not _was_written_by(folder, manifest):
            remote.fetch(folder, manifest)
    except OSError as error:
        raise unusable_storage(storage, error) from None
    return folder


class StudyMirror(threading.Thread):
    """Uploads the database and the studies' own files to a bucket, regularly and at the end: a thread of the driver.

    Args:
        claim: The driver's; after a long silence of this driver, another one may supersede it.
        folder: The local copy.
    """

    def __init__(self, claim: Claim, folder: Path) -> None:
        super().__init__(name="study-mirror", daemon=True)
        self._claim, self._folder, self._closing = claim, folder, threading.Event()
        self._store = claim.remote.store
        self._failing = False

    def run(self) -> None:
        """Upload until closed, or until another driver supersedes this one."""
        cleaned_at, cleanup = -CLEANUP_INTERVAL_S, threading.Thread()
        while not self._closing.wait(UPLOAD_INTERVAL_S) and not self._claim.superseded:
            is_due = time.monotonic() - cleaned_at > CLEANUP_INTERVAL_S and not cleanup.is_alive()
            if self._try_upload(is_open=True) and is_due:
                cleaned_at = time.monotonic()
                cleanup = threading.Thread(target=self._clean_up, name="bucket-cleanup", daemon=True)
                cleanup.start()  # may take long, and the lease must be renewed meanwhile

    def _clean_up(self) -> None:
        try:
            remove_unreferenced(self._store, lambda: self._closing.is_set() or bool(self._claim.superseded))
        except OSError as error:
            if not self._closing.is_set():
                log.warning(
                    "%s: leftovers of killed processes were not removed: %s", self._store.url, describe_error(error)
                )

    def close(self) -> None:
        """Upload the last state, unless another driver supersedes this one; waits ``CLOSE_TIMEOUT_S`` for the bucket."""
        self._closing.set()
        self.join()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while not self._claim.superseded and not self._try_upload(is_open=False):
            if time.monotonic() > deadline:
                log.warning(
                    "%s: not everything was uploaded: the next run continues from %s", self._store.url, self._folder
                )
                return
            time.sleep(1)

    def _try_upload(self, is_open: bool) -> bool:
        """Upload; returns whether nothing is left to do."""
        url = self._store.url
        try:
            _upload(self._claim, self._folder, is_open)
        except SupersededError as error:
            if not is_open:  # otherwise the search reports it when it ends
                log.warning("%s", error)
            return True
        except (OSError, sqlite3.Error) as error:
            if not self._failing:
                log.warning("%s: %s; the search continues", url, describe_error(error))
            self._failing = True
            return False
        if self._failing:
            log.warning("%s answers again", url)
        self._failing = False
        return True


def _claim_bucket(remote: RemoteFolder, folder: Path) -> Claim:
    """Claim the bucket, and update the local copy if another machine's driver was the last to write.

    Raises:
        ConfigError: Another driver is running, or the bucket fails.
    """
    try:
        _require_no_driver(remote, folder)
        claim = remote.claim()
        _update_copy(claim, folder)
        _upload(claim, folder, is_open=True)
    except OSError as error:
        raise unusable_storage(remote.store.url, error) from None
    return claim


def _require_no_driver(remote: RemoteFolder, folder: Path) -> None:
    manifest = remote.manifest()
    driver = manifest.metadata
    if _was_written_by(folder, manifest) or not driver.get("open"):
        return
    if (age := time.time() - driver["time"]) < LEASE_S:
        raise ConfigError(
            f"--storage {remote.store.url}: {driver['process']} runs a search on it and last reported {age:.0f} s "
            f"ago: wait until it ends, or {LEASE_S:.0f} s after its machine is gone"
        )


def _update_copy(claim: Claim, folder: Path) -> None:
    """Bring the copy to the claimed state, unless that state was uploaded from this copy."""
    for draft in folder.rglob(DRAFTS):
        if time.time() - draft.stat().st_mtime > STALE_DRAFT_S:
            draft.unlink()
    is_current = _was_written_by(folder, claim.manifest)
    if not is_current:
        for name in _file_names(folder):
            (folder / name).unlink()  # belongs to a search that another machine has continued
    if not is_current or not (folder / DATABASE).exists():
        claim.remote.fetch(folder, claim.manifest)


def _upload(claim: Claim, folder: Path, is_open: bool) -> None:
    metadata: dict[str, Any] = {
        "copy": _copy_id(folder),
        "process": this_process(),
        "time": time.time(),
        "open": is_open,
    }
    with scratch("driver") as state:
        _copy_files(folder, state)
        claim.push(state, metadata)


def _copy_id(folder: Path) -> str:
    """Return the random name of a local copy."""
    path = folder / COPY_ID
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text()


def _was_written_by(folder: Path, manifest: Manifest) -> bool:
    """Return whether a state was uploaded from a local copy; true for a bucket without a state."""
    return not manifest.metadata or manifest.metadata.get("copy") == _copy_id(folder)


def _file_names(folder: Path) -> list[str]:
    """List the database, and the files directly in each study's folder."""
    found = [path for path in (folder / DATABASE, *sorted(folder.glob("*/*"))) if path.is_file()]
    kept = (path for path in found if path.name != DRIVER_LOCK and not path.name.startswith("."))
    return [path.relative_to(folder).as_posix() for path in kept]


def _copy_files(folder: Path, target: Path) -> None:
    """Copy each file in one consistent state; the database through SQLite, because a transaction may be in progress."""
    for name in _file_names(folder):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        modified_ns = (folder / name).stat().st_mtime_ns  # before it is read: a later change is sent again
        if name == DATABASE:
            with closing(sqlite3.connect(folder / name)) as source, closing(sqlite3.connect(path)) as copy:
                source.backup(copy)
        else:
            shutil.copyfile(folder / name, path)
        os.utime(path, ns=(modified_ns, modified_ns))
