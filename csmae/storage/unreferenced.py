"""Removal of what killed writers left in a bucket: objects that no manifest names, and those of probes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import PurePosixPath

from csmae.config import ConfigError
from csmae.storage.manifest import (
    CLAIM,
    DRIVER,
    MANIFEST,
    OBJECT,
    UNREFERENCED_AGE_S,
    Manifest,
    RemoteFolder,
    token_of,
    valid_manifests,
)
from csmae.storage.object_store import PROBE_PREFIX, ObjectStore

DRIVER_DEPTH = 3
"""Parts of the longest key among the driver's own files: ``driver/STUDY/FILE``."""

PROBE = re.compile(rf"{re.escape(PROBE_PREFIX)}[0-9a-f]{{16}}(/.+)?")


def remove_unreferenced(store: ObjectStore, must_stop: Callable[[], bool] = bool) -> None:
    """Remove objects that are older than ``UNREFERENCED_AGE_S`` and that no manifest names.

    Writers need not stop: an object that is being sent is young, and only a writer whose claim is young and has no manifest
    yet can need the objects of an older state; nothing is removed from the folder of such a writer. Folders that nobody has
    claimed stay as they are, because the bucket may hold other data.

    Args:
        store: The caller has just written to it; the age of an object is measured against the newest one.
        must_stop: Called before each removal.

    Raises:
        OSError: The bucket does not answer.
    """
    written = store.objects()
    now = max(written.values(), default=0.0)
    old = {key for key, time in written.items() if now - time > UNREFERENCED_AGE_S}
    _delete(store, filter(PROBE.fullmatch, sorted(old)), must_stop)
    for folder in sorted({folder for key in old if (folder := _folder(PurePosixPath(key)))}):
        if must_stop():
            return
        _clear(RemoteFolder(store, folder), old, must_stop)


def _delete(store: ObjectStore, keys: Iterable[str], must_stop: Callable[[], bool]) -> None:
    store.delete(takewhile(lambda _: not must_stop(), keys))


def _folder(key: PurePosixPath) -> str | None:
    """Return the remote folder that an object may belong to; None if it is not one of ours."""
    if not OBJECT.fullmatch(key.name):
        return None
    if key.parts[0] == DRIVER and len(key.parts) <= DRIVER_DEPTH:
        return DRIVER
    is_trial = len(key.parts) > 3 and key.parts[1] == "trials" and key.parts[2].isdecimal()
    return "/".join(key.parts[:3]) if is_trial else None


def _clear(remote: RemoteFolder, old: set[str], must_stop: Callable[[], bool]) -> None:
    names = remote.store.names(remote.key)
    if not any(map(token_of, names)):
        return  # nobody has claimed it
    try:
        manifests = {name: remote.read(name) or Manifest() for name in valid_manifests(names)}
    except ConfigError:
        return  # damaged; the next process that needs the files reports it
    named = {f"{remote.key}/{key}" for manifest in manifests.values() for key in manifest.files.values()}
    invalid = {f"{remote.key}/{name}" for name in names if MANIFEST.fullmatch(name) and name not in manifests}
    unnamed = [key for key in old - named if _folder(PurePosixPath(key)) == remote.key or key in invalid]
    if not unnamed:
        return
    names = remote.store.names(remote.key)  # listed after the manifests were read
    writers = [token_of(name) for name in names if CLAIM.fullmatch(name) and f"{remote.key}/{name}" not in old]
    if max(writers, default="") <= max(map(token_of, manifests), default=""):
        _delete(remote.store, sorted(unnamed), must_stop)
