"""Files that belong together, in a bucket: a manifest names the objects, and an object is never written twice.

So whoever reads the manifest has one state of all files, whatever is being written meanwhile.

A writer claims the files first. Each claim has a manifest of its own, and the newest claim's manifest is the state: a writer
that was taken for dead cannot overwrite its successor's state, whenever it wakes up. A manifest counts only as long as its
claim is there, so that files which were deleted stay deleted. It needs nothing of the bucket but that
a listing shows what was written before (S3 and Google's both promise that), no locks and no conditional writes.
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
"""Key of the driver's own files in a storage."""

MANIFEST = re.compile(r"manifest(-(?P<token>\d{8}-[0-9a-f]{8}))?\.json")
"""Of the claim with this token; without one of a writer that knew no claims."""

CLAIM = re.compile(r"claim-(?P<token>\d{8}-[0-9a-f]{8})")

OBJECT = re.compile(r".+\.[0-9a-f]{14,16}")

UNREFERENCED_AGE_S = 24 * 3600.0
"""Age at which an object that no manifest names is removed, see ``csmae.storage.unreferenced``."""

READS = 5
"""Attempts to read a manifest that a newer one takes the place of meanwhile."""


class SupersededError(ConfigError):
    """Somebody else claimed the files since."""


class DeletedError(SupersededError):
    """The files were deleted since, and the claim with them."""


@dataclass(frozen=True)
class Manifest:
    """A state of the files."""

    files: dict[str, str] = field(default_factory=dict)
    """By path within the folder, the object's name."""
    note: dict[str, Any] = field(default_factory=dict)
    """What its writer says of it."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder's files in a bucket.

    Args:
        bucket: Where.
        key: Of the folder.
    """

    bucket: ObjectStore
    key: str

    def manifest(self) -> Manifest:
        """The last state, without files where there is none.

        Raises:
            OSError: The bucket does not answer.
            ConfigError: The manifest is none of ours.
        """
        damaged: ConfigError | None = None
        for _ in range(READS):
            names = manifests(self.bucket.names(self.key))
            if not names:
                return Manifest()
            if content := self.bucket.get_bytes(f"{self.key}/{names[-1]}"):
                try:
                    return self.parsed(names[-1], content)
                except ConfigError as error:  # pyarrow asks for the size first: of a longer successor it reads a part
                    damaged = error
        raise damaged or OSError(f"{self.key}: the manifest changed during every read")

    def parsed(self, name: str, content: bytes) -> Manifest:
        """What a manifest says; errors as of ``manifest``."""
        where = f"{self.bucket.url}: {self.key}/{name}"
        try:
            found = Manifest(**json.loads(content))
            names = [PurePosixPath(name) for pair in found.files.items() for name in pair]
            found.note.keys()
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"{where} is damaged: remove it") from None
        if bad := [name for name in names if name.is_absolute() or ".." in name.parts]:
            raise ConfigError(f"{where} names {str(bad[0])!r}, a file elsewhere: somebody else wrote it, remove it")
        return found

    def claim(self) -> Claim:
        """Become the one writer; whoever was it before may write no more.

        Raises:
            OSError: The bucket does not answer.
            SupersededError: Somebody else did the same at the same moment.
        """
        number = max((int(token[:8]) for token in self.claims()), default=0) + 1
        claim = Claim(self, f"{number:08}-{secrets.token_hex(4)}")
        self.bucket.put_bytes(
            f"{self.key}/claim-{claim.token}", f"process {os.getpid()} on {socket.gethostname()}".encode()
        )
        claim.check()
        claim.state = self.manifest()  # after the claim: what it names is removed by nobody else from now on
        return claim

    def claims(self) -> list[str]:
        """Tokens of the writers, those that have not written yet included; the last one's is the largest."""
        found = (MANIFEST.fullmatch(name) or CLAIM.fullmatch(name) for name in self.bucket.names(self.key))
        return sorted({match["token"] for match in found if match and match["token"]})

    def fetch(self, folder: Path, state: Manifest, wanted: Callable[[str], bool] = bool) -> None:
        """Bring a folder to a state; other files in it stay.

        Args:
            folder: Made where it does not exist.
            state: From ``manifest``.
            wanted: Which of the files, by their names.

        Raises:
            OSError: The bucket does not answer, the state is not there any more, or the disk is full.
        """
        for name, key in state.files.items():
            path = folder / name
            if wanted(name) and not (path.exists() and _object(folder, name) == key):
                self.bucket.get(f"{self.key}/{key}", path)
                written = int(key.rpartition(".")[2], 16)
                os.utime(path, ns=(written, written))

    def delete(self) -> None:
        """Remove all of it.

        Raises:
            OSError: The bucket does not answer.
        """
        self.bucket.delete_below(self.key)


@dataclass
class Claim:
    """The right to write a folder's files."""

    files: RemoteFolder
    token: str
    state: Manifest = field(default_factory=Manifest)
    """Last one that was found or written."""
    lost: str = ""
    """Who took the files over, once that is known."""

    def check(self) -> None:
        """Make sure that nobody claimed the files since, or deleted them.

        Raises:
            OSError: The bucket does not answer.
            SupersededError: Somebody did.
        """
        names, bucket = self.files.bucket.names(self.files.key), self.files.bucket
        what = "this storage" if self.files.key == DRIVER else self.files.key
        if claimed := [name for name in names if CLAIM.fullmatch(name) and name > f"claim-{self.token}"]:
            who = bucket.get_bytes(f"{self.files.key}/{max(claimed)}") or b"another process"
            self.lost = f"--storage {bucket.url}: {who.decode()} has taken {what} over"
            raise SupersededError(self.lost)
        if f"claim-{self.token}" not in names:  # which only a successor removes, or who deletes all of the files
            self.lost = f"--storage {bucket.url}: {what} was deleted"
            raise DeletedError(self.lost)

    def push(self, folder: Path, note: dict[str, Any]) -> Manifest:
        """Make a folder's files the state in the bucket; what did not change is not sent again.

        Args:
            folder: Nobody may write to it meanwhile.
            note: What to say of it.

        Raises:
            OSError: The bucket does not take it now; the state before stays.
            SupersededError: Somebody else claimed the files.
        """
        self.check()
        files, begun = self.files, time.time()
        new = Manifest(objects(folder), note)
        there = set(self.state.files.values())
        for name, key in new.files.items():
            if key not in there:
                files.bucket.put(f"{files.key}/{key}", folder / name)
        if new == self.state:
            return new
        if time.time() - begun > UNREFERENCED_AGE_S / 2:
            raise OSError("the upload took over 12 hours and is repeated")
        files.bucket.put_bytes(f"{files.key}/manifest-{self.token}.json", json.dumps(vars(new)).encode())
        self.check()  # whoever claimed before this moment may have taken up the state before: its objects must stay
        self.state = new
        older = [name for name in files.bucket.names(files.key) if _is_before(name, self.token)]
        files.bucket.delete(f"{files.key}/{key}" for key in [*older, *there - set(new.files.values())])
        return new


@dataclass(frozen=True)
class Files:
    """Where a storage folder's files lie, if the storage is a bucket.

    Args:
        bucket: Where.
        folder: The driver's copy of it.
        claim: The driver's.
    """

    bucket: ObjectStore
    folder: Path
    claim: Claim | None = None

    def of(self, folder: Path) -> RemoteFolder:
        """The files of a folder within the driver's."""
        return RemoteFolder(self.bucket, folder.relative_to(self.folder).as_posix())

    @property
    def lost(self) -> str:
        """Who took the storage over from this driver, if that is known."""
        return self.claim.lost if self.claim else ""

    def check(self) -> None:
        """Make sure that the storage is still this driver's.

        Raises:
            OSError: The bucket does not answer.
            SupersededError: Another driver took it over.
        """
        if self.claim:
            self.claim.check()


def snapshot(folder: Path, target: Path) -> Path:
    """Hard links to a folder's files: they stay as they are while others are renamed into their places."""
    for name in _names(folder):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.hardlink_to(folder / name)
        except OSError:
            shutil.copy2(folder / name, path)
    return target


def objects(folder: Path) -> dict[str, str]:
    """By path within a folder, the name of each whole file's object."""
    return {name: _object(folder, name) for name in _names(folder)}


def _names(folder: Path) -> Iterator[str]:
    """Files that are whole: names that begin with a dot, or end with .new, are drafts."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and path.suffix != ".new":
            yield name.as_posix()


def _object(folder: Path, name: str) -> str:
    """What a file's object is called: with the time at which it was written."""
    return f"{name}.{(folder / name).stat().st_mtime_ns:x}"


def manifests(names: Iterable[str]) -> list[str]:
    """The manifests that count among a folder's objects, the newest last.

    One without its claim is of an earlier writer, or was on its way while the files were deleted.
    """
    names = set(names)
    found = (name for name in names if MANIFEST.fullmatch(name))
    return sorted((name for name in found if not token_of(name) or f"claim-{token_of(name)}" in names), key=token_of)


def token_of(manifest: str) -> str:
    """Of a manifest's claim; empty for one without."""
    match = MANIFEST.fullmatch(manifest)
    return (match and match["token"]) or ""


def _is_before(name: str, token: str) -> bool:
    """Whether an object is the claim or the manifest of an earlier writer."""
    match = MANIFEST.fullmatch(name) or CLAIM.fullmatch(name)
    return match is not None and (match["token"] or "") < token
