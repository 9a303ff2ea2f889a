"""What killed writers leave in a bucket: objects that no manifest names, and words of checks."""

from __future__ import annotations

from pathlib import PurePosixPath

from csmae.tuning.bucket import CHECK, Bucket
from csmae.tuning.file_set import DRIVER, MANIFEST, OBJECT, UNNAMED_S, FileSet, token_of
from csmae.tuning.meeting import MEETING

DRIVER_DEPTH = 3
"""Parts of the longest key among the driver's own files: ``driver/STUDY/FILE``."""


def remove_leftovers(bucket: Bucket) -> None:
    """Remove objects of a storage that are older than ``UNNAMED_S`` and named by no manifest.

    Nobody has to stop writing: an object that is being sent is young, and one of an older state can only be taken up by a
    writer whose claim is young and has no manifest yet, in whose folder nothing is removed.

    Args:
        bucket: The caller has just written to it: its clock is read off its newest object.

    Raises:
        OSError: The bucket does not answer.
        ConfigError: A manifest is damaged.
    """
    written = bucket.objects()
    now = max(written.values(), default=0.0)
    old = {key for key, time in written.items() if now - time > UNNAMED_S}
    bucket.delete(key for key in old if key.startswith((CHECK, MEETING)))
    for folder in sorted({folder for key in old if (folder := _folder(PurePosixPath(key)))}):
        _clear(FileSet(bucket, folder), old)


def _folder(key: PurePosixPath) -> str | None:
    """The set of files that an object belongs to; None where it is none of ours."""
    if not OBJECT.fullmatch(key.name):
        return None
    if key.parts[0] == DRIVER and len(key.parts) <= DRIVER_DEPTH:
        return DRIVER
    return "/".join(key.parts[:3]) if len(key.parts) > 3 and key.parts[1] == "trials" else None


def _clear(files: FileSet, old: set[str]) -> None:
    names, named = [name for name in files.bucket.names(files.key) if MANIFEST.fullmatch(name)], set()
    for name in names:
        content = files.bucket.get_bytes(f"{files.key}/{name}")
        named |= {f"{files.key}/{key}" for key in (files.parsed(name, content).files.values() if content else ())}
    unnamed = [key for key in old - named if _folder(PurePosixPath(key)) == files.key]
    if not unnamed:
        return
    writers = [
        token for token in files.claims() if f"{files.key}/claim-{token}" not in old
    ]  # after the manifests were read
    if max(writers, default="") <= max(map(token_of, names), default=""):
        files.bucket.delete(unnamed)
