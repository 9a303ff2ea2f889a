"""Whether machines share a storage: the driver leaves a word there, each node reads it and answers, the driver reads that."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from csmae.storage.object_store import ObjectStore, reason

DRIVER = "driver"

PROBE_PREFIX = ".meeting-"
"""Prefix of places."""


@dataclass(frozen=True)
class StorageProbe:
    """A place within the storage.

    Args:
        storage: A folder, or a bucket.
        name: Of the place, which nobody can know before; it is the word, too.
    """

    storage: Path | ObjectStore
    name: str

    def __str__(self) -> str:
        return self.storage.url if isinstance(self.storage, ObjectStore) else str(self.storage)

    def speak(self, who: str) -> str | None:
        """Leave the word; why that is impossible."""
        try:
            if isinstance(self.storage, ObjectStore):
                self.storage.put_bytes(f"{self.name}/{who}", self.name.encode())
            else:
                (self.storage / self.name / who).write_text(self.name)
        except FileNotFoundError:
            return f"does not see what the driver writes to {self}"
        except OSError as error:
            return f"{self} cannot be written: {error.strerror or reason(error)}"
        return None

    def can_read(self, who: str) -> bool:
        """Whether somebody's word is there."""
        try:
            if isinstance(self.storage, ObjectStore):
                return self.storage.get_bytes(f"{self.name}/{who}") == self.name.encode()
            return (self.storage / self.name / who).read_text() == self.name
        except OSError:
            return False

    def answer(self, who: str) -> str | None:
        """What a node does; what is wrong."""
        if not self.can_read(DRIVER):
            return f"does not see what the driver writes to {self}"
        return self.speak(who)


@contextmanager
def storage_probe(storage: Path | ObjectStore) -> Iterator[tuple[StorageProbe, str | None]]:
    """A place for as long as the block lasts, with the driver's word in it; or why it cannot be there."""
    place, trouble = StorageProbe(storage, f"{PROBE_PREFIX}{secrets.token_hex(8)}"), None
    if isinstance(storage, Path):
        try:
            (storage / place.name).mkdir(parents=True)
        except OSError as error:
            trouble = f"{storage} cannot be written: {error.strerror}"
    try:
        yield place, trouble or place.speak(DRIVER)
    finally:
        if isinstance(storage, Path):
            shutil.rmtree(storage / place.name, ignore_errors=True)
        else:
            _clear(storage, place.name)


def _clear(bucket: ObjectStore, name: str) -> None:
    try:
        bucket.delete(f"{name}/{who}" for who in bucket.names(name))
    except OSError:
        return  # a few bytes stay in a bucket that does not answer
