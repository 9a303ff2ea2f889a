"""Files that appear with all of their content, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

DRAFTS = ".*.tmp"
"""Glob pattern of drafts. Code that lists a folder's files skips names that begin with a dot."""


@contextmanager
def atomic_write(
    path: Path, *, durable: bool = False, concurrent: bool = False, overwrite: bool = True, mode: int = 0o666
) -> Iterator[BinaryIO]:
    """Write a draft beside a file; the draft gets the file's name if the block ends without an error.

    Args:
        path: Its folder must exist.
        durable: Flush the file to the disk first, so that it survives a power cut.
        concurrent: Give this writer a draft that no other process uses. Without it there is one draft, so that the next
            writer overwrites what a killed one left.
        overwrite: Allow the file to exist.
        mode: Permissions, restricted by the umask.

    Yields:
        The draft.

    Raises:
        FileExistsError: The file exists and must not be overwritten.
        OSError: The file cannot be written; its former content stays.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp" if concurrent else f".{path.name}.tmp")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if overwrite:
            draft.replace(path)
        else:
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
