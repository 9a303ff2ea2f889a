"""What killed writers leave in a bucket: objects that no manifest names, and objects that a check wrote."""

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
    manifests,
    token_of,
)
from csmae.storage.object_store import CHECK, ObjectStore
from csmae.storage.probe import PROBE_PREFIX

DRIVER_DEPTH = 3
"""Parts of the longest key among the driver's own files: ``driver/STUDY/FILE``."""

CHECKED = re.compile(rf"{re.escape(CHECK)}[0-9a-f]{{16}}|{re.escape(PROBE_PREFIX)}[0-9a-f]{{16}}/.+")
"""Objects that a check wrote."""

OUR_NOTES = {"mark", "owner"}
"""What a manifest's note holds at least one of."""


def remove_unreferenced(bucket: ObjectStore, must_stop: Callable[[], bool] = bool) -> None:
    """Remove objects of a storage that are older than ``UNREFERENCED_AGE_S`` and named by no manifest.

    Nobody has to stop writing: an object that is being sent is young, and one of an older state can only be taken up by a
    writer whose claim is young and has no manifest yet, in whose folder nothing is removed. Folders without a claim or a
    manifest of ours are left as they are, for the bucket may hold other data.

    Args:
        bucket: The caller has just written to it: its clock is read off its newest object.
        must_stop: Asked before each object is removed.

    Raises:
        OSError: The bucket does not answer.
    """
    written = bucket.objects()
    now = max(written.values(), default=0.0)
    old = {key for key, time in written.items() if now - time > UNREFERENCED_AGE_S}
    _delete(bucket, filter(CHECKED.fullmatch, sorted(old)), must_stop)
    for folder in sorted({folder for key in old if (folder := _folder(PurePosixPath(key)))}):
        if must_stop():
            return
        _clear(RemoteFolder(bucket, folder), old, must_stop)


def _delete(bucket: ObjectStore, keys: Iterable[str], must_stop: Callable[[], bool]) -> None:
    bucket.delete(takewhile(lambda _: not must_stop(), keys))


def _folder(key: PurePosixPath) -> str | None:
    """The set of files that an object may belong to; None where it is none of ours."""
    if not OBJECT.fullmatch(key.name):
        return None
    if key.parts[0] == DRIVER and len(key.parts) <= DRIVER_DEPTH:
        return DRIVER
    is_trial = len(key.parts) > 3 and key.parts[1] == "trials" and key.parts[2].isdecimal()
    return "/".join(key.parts[:3]) if is_trial else None


def _clear(files: RemoteFolder, old: set[str], must_stop: Callable[[], bool]) -> None:
    names = files.bucket.names(files.key)
    try:
        states = {name: _read(files, name) for name in manifests(names)}
    except ConfigError:
        return  # damaged, or of somebody else: whoever needs the files says so
    if not _is_ours(names, states.values()):
        return
    named = {f"{files.key}/{key}" for state in states.values() for key in state.files.values()}
    late = {f"{files.key}/{name}" for name in names if MANIFEST.fullmatch(name) and name not in states}
    unnamed = [key for key in old - named if _folder(PurePosixPath(key)) == files.key or key in late]
    if not unnamed:
        return
    again = files.bucket.names(files.key)  # after the manifests were read
    writers = [
        match["token"] for name in again if (match := CLAIM.fullmatch(name)) and f"{files.key}/{name}" not in old
    ]
    if max(writers, default="") <= max(map(token_of, states), default=""):
        _delete(files.bucket, sorted(unnamed), must_stop)


def _read(files: RemoteFolder, name: str) -> Manifest:
    content = files.bucket.get_bytes(f"{files.key}/{name}")
    return files.parsed(name, content) if content else Manifest()


def _is_ours(names: Iterable[str], states: Iterable[Manifest]) -> bool:
    """Whether a folder has been claimed, or has a manifest that somebody wrote who knew no claims."""
    signed = any(token_of(name) or CLAIM.fullmatch(name) for name in names)
    return signed or any(OUR_NOTES & state.note.keys() for state in states)
