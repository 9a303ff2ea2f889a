"""Files that belong together, in a bucket: a manifest names the objects, and an object is never written twice.

So whoever reads the manifest has one state of all files, whatever is being written meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from csmae.config import ConfigError
from csmae.tuning.bucket import Bucket

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """A state of the files."""

    files: dict[str, str] = field(default_factory=dict)
    """By path within the folder, the object's name."""
    note: dict[str, Any] = field(default_factory=dict)
    """What its writer says of it."""


@dataclass(frozen=True)
class FileSet:
    """A folder's files in a bucket.

    Args:
        bucket: Where.
        key: Of the folder.
    """

    bucket: Bucket
    key: str

    def manifest(self) -> Manifest:
        """The last state, without files where there is none.

        Raises:
            OSError: The bucket does not answer.
            ConfigError: The manifest is none of ours.
        """
        content = self.bucket.get_bytes(f"{self.key}/{MANIFEST}")
        if content is None:
            return Manifest()
        try:
            found = Manifest(**json.loads(content))
            names = [PurePosixPath(name) for pair in found.files.items() for name in pair]
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(f"{self.bucket.url}: {self.key}/{MANIFEST} is damaged: remove it") from None
        if bad := [name for name in names if name.is_absolute() or ".." in name.parts]:
            raise ConfigError(f"{self.bucket.url}: {self.key}/{MANIFEST} names {str(bad[0])!r}, a file elsewhere")
        return found

    def push(self, folder: Path, note: dict[str, Any]) -> Manifest:
        """Make a folder's files the state in the bucket; what did not change is not sent again.

        Args:
            folder: Nobody may write to it meanwhile.
            note: What to say of it.

        Raises:
            OSError: The bucket does not take it now; the state before stays.
        """
        old, new = self.manifest(), Manifest({name: _object(folder, name) for name in _names(folder)}, note)
        there = set(old.files.values())
        for name, key in new.files.items():
            if key not in there:
                self.bucket.put(f"{self.key}/{key}", folder / name)
        if new != old:
            self.bucket.put_bytes(f"{self.key}/{MANIFEST}", json.dumps(vars(new)).encode())
        self.bucket.delete(f"{self.key}/{key}" for key in there - set(new.files.values()))
        return new

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
        state = self.manifest()
        if state.files:
            self.bucket.delete([f"{self.key}/{MANIFEST}", *(f"{self.key}/{key}" for key in state.files.values())])


@dataclass(frozen=True)
class Files:
    """Where a storage folder's files lie, if the storage is a bucket.

    Args:
        bucket: Where.
        folder: The driver's copy of it.
    """

    bucket: Bucket
    folder: Path

    def of(self, folder: Path) -> FileSet:
        """The files of a folder within the driver's."""
        return FileSet(self.bucket, folder.relative_to(self.folder).as_posix())


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


def _names(folder: Path) -> Iterator[str]:
    """Files that are whole: names that begin with a dot, or end with .new, are drafts."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and path.suffix != ".new":
            yield name.as_posix()


def _object(folder: Path, name: str) -> str:
    """What a file's object is called: with the time at which it was written."""
    return f"{name}.{(folder / name).stat().st_mtime_ns:x}"
