"""A check that all nodes share a storage: the driver writes to it, each node reads that and writes, the driver reads that."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from csmae.storage.object_store import PROBE_PREFIX, ObjectStore, describe_error

DRIVER = "driver"


@dataclass(frozen=True)
class StorageProbe:
    """One check, as the driver sends it to the nodes.

    Args:
        store: The storage.
        name: Unpredictable prefix of the check's objects, which also is their content.
    """

    store: ObjectStore
    name: str

    def write(self, who: str) -> str | None:
        """Write as the driver or as a node; returns why that fails, if it does."""
        try:
            self.store.put_bytes(f"{self.name}/{who}", self.name.encode())
        except OSError as error:
            return f"{self.store.url} cannot be written: {describe_error(error)}"
        return None

    def can_read(self, who: str) -> bool:
        """Return whether this process sees what the driver or a node has written."""
        try:
            return self.store.get_bytes(f"{self.name}/{who}") == self.name.encode()
        except OSError:
            return False

    def respond(self, node: str) -> str | None:
        """Read as a node what the driver has written, and write; returns why that fails, if it does."""
        if not self.can_read(DRIVER):
            return f"does not see what the driver writes to {self.store.url}"
        return self.write(node)


@contextmanager
def storage_probe(store: ObjectStore) -> Iterator[tuple[StorageProbe, str | None]]:
    """Start a check that lasts as long as the block.

    Yields:
        The check, and why the driver cannot write to the storage, if it cannot.
    """
    probe = StorageProbe(store, f"{PROBE_PREFIX}{secrets.token_hex(8)}")
    try:
        yield probe, probe.write(DRIVER)
    finally:
        with suppress(OSError):  # a bucket that does not answer keeps a few bytes
            store.delete_below(probe.name)
