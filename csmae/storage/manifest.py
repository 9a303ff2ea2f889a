"""Folders in an object store: one writer at a time, and only whole states for every reader.

Below the key of a folder there are three kinds of objects:

``FILE.TIME``
    A file's content, named after the time at which the file was modified. Such an object is never overwritten.
``manifest-TOKEN.json``
    A state of the folder: the object of each file, and metadata. It is written after the objects that it names.
``claim-TOKEN``
    The right of one writer. A token is ``NUMBER-RANDOM``, and a new claim's number is larger than all others.

A writer first creates its claim; every upload replaces the manifest of this claim. **The newest claim's manifest is the state
of the folder**, and a manifest whose claim is gone does not count. Therefore:

- A reader gets one state of all files, whatever is being written at the same time.
- A writer that was presumed dead cannot overwrite its successor's state, whenever it continues: its token is older. It
  checks for newer claims before and after every upload, and stops if there is one (``SupersededError``).
- Deleted files stay deleted: a manifest that arrives after the deletion has no claim any more.

A writer's uploads remove older claims and manifests, and objects that are no longer named; ``csmae.storage.unreferenced``
removes what killed writers left. The store needs neither locks nor conditional writes, but a listing must show what was
written before, which S3 and Google Cloud Storage guarantee.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from csmae.config import ConfigError
from csmae.storage.object_store import ObjectStore

DRIVER = "driver"
"""Key of the driver's own files in a bucket."""

MANIFEST = re.compile(r"manifest-(?P<token>\d{8}-[0-9a-f]{8})\.json")

CLAIM = re.compile(r"claim-(?P<token>\d{8}-[0-9a-f]{8})")

OBJECT = re.compile(r".+\.[0-9a-f]{14,16}")
"""Name of an object with a file's content."""

OLD_MANIFEST = "manifest.json"
"""Manifest of version 0.1.0, whose writers did not create claims."""

UNREFERENCED_AGE_S = 24 * 3600.0
"""Age at which an object that no manifest names is removed, see ``csmae.storage.unreferenced``."""

READ_ATTEMPTS = 5
"""Attempts to read a manifest that is replaced at the same time."""


class SupersededError(ConfigError):
    """Another process has claimed the folder since."""


class DeletedError(SupersededError):
    """The folder was deleted since, and the claim with it."""


@dataclass(frozen=True)
class Manifest:
    """A state of a folder."""

    files: dict[str, str] = field(default_factory=dict)
    """Object names, by path within the folder."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the writer says about this state."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder in an object store.

    Args:
        store: Holds the objects.
        key: Prefix of the folder's objects.
    """

    store: ObjectStore
    key: str

    def manifest(self) -> Manifest:
        """Read the current state; it has no files if nothing was uploaded.

        Raises:
            OSError: The store does not answer.
            ConfigError: The manifest is damaged, or was not written by this version.
        """
        damaged: ConfigError | None = None
        for _ in range(READ_ATTEMPTS):
            names = self.store.names(self.key)
            if OLD_MANIFEST in names:
                raise ConfigError(
                    f"--storage {self.store.url}: {self.key} was written by version 0.1.0: name another folder of the bucket, "
                    "or continue with that version"
                )
            current = valid_manifests(names)
            if not current:
                return Manifest()
            try:
                if manifest := self.read(current[-1]):
                    return manifest
            except ConfigError as error:  # pyarrow asks for the size first, and reads only a part of a longer successor
                damaged = error
        raise damaged or OSError(f"{self.key}: the manifest changed during every read")

    def read(self, name: str) -> Manifest | None:
        """Read a manifest by its name; None if there is none. Errors are those of ``manifest``."""
        content = self.store.get_bytes(f"{self.key}/{name}")
        if not content:
            return None
        where = f"{self.store.url}: {self.key}/{name}"
        try:
            manifest = Manifest(**json.loads(content))
            paths = [PurePosixPath(path) for item in manifest.files.items() for path in item]
            manifest.metadata.keys()
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"{where} is damaged: remove it") from None
        if outside := [path for path in paths if path.is_absolute() or ".." in path.parts]:
            raise ConfigError(
                f"{where} names a file outside its folder, {str(outside[0])!r}: it is not ours, remove it"
            )
        return manifest

    def claim(self) -> Claim:
        """Become the folder's only writer.

        Raises:
            OSError: The store does not answer.
            SupersededError: Another process claimed the folder at the same time.
        """
        tokens = filter(None, map(token_of, self.store.names(self.key)))
        number = max((int(token[:8]) for token in tokens), default=0) + 1
        claim = Claim(self, f"{number:08}-{secrets.token_hex(4)}")
        self.store.put_bytes(f"{self.key}/claim-{claim.token}", this_process().encode())
        claim.check()
        claim.manifest = self.manifest()  # read after the claim exists: from now on nobody else removes its objects
        return claim

    def fetch(self, folder: Path, manifest: Manifest, wanted: Callable[[str], bool] = bool) -> None:
        """Download a state's files; other files in the local folder stay.

        Args:
            folder: Local folder, created if it does not exist.
            manifest: From ``manifest``.
            wanted: Filter for paths within the folder.

        Raises:
            OSError: The store does not answer, an object of the state no longer exists, or the disk is full.
        """
        for name, key in manifest.files.items():
            path = folder / name
            if wanted(name) and not (path.exists() and _object_name(folder, name) == key):
                self.store.get(f"{self.key}/{key}", path)
                modified_ns = int(key.rpartition(".")[2], 16)
                os.utime(path, ns=(modified_ns, modified_ns))

    def delete(self) -> None:
        """Remove the folder with its manifests and claims.

        Raises:
            OSError: The store does not answer.
        """
        self.store.delete_below(self.key)


@dataclass
class Claim:
    """A writer's right to a remote folder."""

    remote: RemoteFolder
    token: str
    manifest: Manifest = field(default_factory=Manifest)
    """The last state that this writer found or wrote."""
    superseded: str = ""
    """Why the claim is no longer valid, once this process knows; for the user."""

    def check(self) -> None:
        """Make sure that the claim is the newest and still exists.

        Raises:
            OSError: The store does not answer.
            SupersededError: Another process has claimed or deleted the folder.
        """
        store, key = self.remote.store, self.remote.key
        what = "this storage" if key == DRIVER else key
        names = store.names(key)
        if newer := [name for name in names if CLAIM.fullmatch(name) and name > f"claim-{self.token}"]:
            who = store.get_bytes(f"{key}/{max(newer)}") or b"another process"
            self.superseded = f"--storage {store.url}: {who.decode()} has taken {what} over"
            raise SupersededError(self.superseded)
        if f"claim-{self.token}" not in names:  # only a successor removes it, or whoever deletes the folder
            self.superseded = f"--storage {store.url}: {what} was deleted"
            raise DeletedError(self.superseded)

    def push(self, folder: Path, metadata: dict[str, Any]) -> Manifest:
        """Upload a local folder as the new state; unchanged files are not sent again.

        Args:
            folder: Must not change during the upload.
            metadata: Plain JSON values.

        Raises:
            OSError: The store does not accept it now; the former state stays.
            SupersededError: Another process has claimed or deleted the folder.
        """
        self.check()
        store, key, started = self.remote.store, self.remote.key, time.time()
        new = Manifest(object_names(folder), metadata)
        uploaded = set(self.manifest.files.values())
        for name, object_name in new.files.items():
            if object_name not in uploaded:
                store.put(f"{key}/{object_name}", folder / name)
        if new == self.manifest:
            return new
        if time.time() - started > UNREFERENCED_AGE_S / 2:
            raise OSError("the upload took over 12 hours and is repeated")
        store.put_bytes(f"{key}/manifest-{self.token}.json", json.dumps(vars(new)).encode())
        self.check()  # a writer that claimed before this moment may have read the former state: its objects must stay
        self.manifest = new
        older = [name for name in store.names(key) if "" < token_of(name) < self.token]
        store.delete(f"{key}/{name}" for name in [*older, *uploaded - set(new.files.values())])
        return new


@dataclass(frozen=True)
class RemoteStorage:
    """A storage in a bucket, as a search uses it.

    Args:
        store: The bucket.
        folder: The driver's local copy.
        claim: The driver's.
    """

    store: ObjectStore
    folder: Path
    claim: Claim

    def remote_folder(self, folder: Path) -> RemoteFolder:
        """Return the remote folder of a folder within the driver's copy."""
        return RemoteFolder(self.store, folder.relative_to(self.folder).as_posix())


def hardlink(folder: Path, target: Path) -> None:
    """Fill a folder with hard links to another one's files, which stay unchanged while others are renamed over them."""
    for name in _file_names(folder):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.hardlink_to(folder / name)
        except OSError:
            shutil.copy2(folder / name, path)


def object_names(folder: Path) -> dict[str, str]:
    """List a local folder's files: by path within it, the name of the object for the file's content."""
    return {name: _object_name(folder, name) for name in _file_names(folder)}


def _file_names(folder: Path) -> Iterator[str]:
    """List the files by their path within a folder, without hidden ones, which are drafts or snapshots.

    Another thread may remove a hidden folder meanwhile, hence not ``rglob``, which fails then.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _object_name(folder: Path, name: str) -> str:
    return f"{name}.{(folder / name).stat().st_mtime_ns:x}"


def valid_manifests(names: Iterable[str]) -> list[str]:
    """Filter a folder's object names: manifests whose claim exists, the newest last."""
    names = set(names)
    return sorted(name for name in names if MANIFEST.fullmatch(name) and f"claim-{token_of(name)}" in names)


def token_of(name: str) -> str:
    """Return the token of a manifest or claim; empty for other objects."""
    match = MANIFEST.fullmatch(name) or CLAIM.fullmatch(name)
    return match["token"] if match else ""


def this_process() -> str:
    """Describe this process for the users of other machines."""
    return f"process {os.getpid()} on {socket.gethostname()}"
