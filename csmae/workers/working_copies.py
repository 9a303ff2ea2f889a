"""Where a machine keeps its working copies of trials' files, and which of them are no longer needed."""

from __future__ import annotations

import json
import time
import zlib
from contextlib import suppress
from pathlib import Path

from csmae.config import ConfigError
from csmae.scratch import remove_unused, scratch_root
from csmae.storage.manifest import Manifest, RemoteFolder, object_names

PREFIX = "trial-"
"""Beginning of the names of working copies."""

SYNCED = ".synced"
"""File in a working copy with the last state that the copy and the bucket had in common."""

KEEP_S = 24 * 3600.0
"""Time for which a dead worker's copy is kept if it has files that the bucket does not have."""


def working_copy_dir(remote: RemoteFolder, rank: int) -> Path:
    """Return where this machine keeps a rank's copy of a trial's files, for every search that trains it."""
    name = f"{remote.store.url.partition('?')[0]}/{remote.key}"
    return scratch_root() / f"{PREFIX}{zlib.crc32(name.encode()):08x}-{remote.key.replace('/', '-')}-rank-{rank}"


def remove_stale_copies(root: Path | None = None) -> None:
    """Remove the working copies of dead workers, except those with files that the bucket may not have."""
    with suppress(OSError, ConfigError):  # the next worker tries again
        remove_unused(root or scratch_root(), PREFIX, keep=_may_be_needed)


def _may_be_needed(folder: Path) -> bool:
    synced = read_synced(folder)
    if synced is None or not folder.name.endswith("rank-0") or synced.files == object_names(folder):
        return False
    return time.time() - max((path.stat().st_mtime for path in folder.iterdir()), default=0.0) < KEEP_S


def read_synced(folder: Path) -> Manifest | None:
    """Read the last state that a working copy and the bucket had in common; None if there is no readable one."""
    try:
        return Manifest(**json.loads((folder / SYNCED).read_text()))
    except (OSError, ValueError, TypeError):
        return None
