"""A folder for the files and sockets of a local Ray, where Ray's default folder cannot hold them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from csmae.config import ConfigError
from csmae.scratch import scratch

SOCKET_BYTES = 107
"""Maximum length of a Unix socket's path."""

LONGEST_SOCKET = "ray/session_2026-01-31_23-59-59_000000_4194304/sockets/plasma_store.99"
"""The longest path that Ray creates below its temporary folder."""

SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders with short names that every account may use."""


@contextmanager
def ray_temp_dir(default: Path | None = None) -> Iterator[str | None]:
    """Choose Ray's temporary folder for as long as the block lasts.

    Args:
        default: Parent of Ray's own choice; None is ``RAY_TMPDIR``, ``TMPDIR`` or ``/tmp``.

    Yields:
        None where Ray's own choice works; else a folder with a short name, which is removed afterwards.

    Raises:
        ConfigError: No folder is writable.
    """
    default = default or Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    if len(os.fsencode(default.absolute() / LONGEST_SOCKET)) <= SOCKET_BYTES and _is_writable(default):
        yield None
        return
    with ExitStack() as stack:
        yield _short_folder(default, stack)


def _is_writable(default: Path) -> bool:
    """Whether Ray can create its folder there, or write to one that another account created."""
    try:
        (default / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=default / "ray"):
            return True
    except OSError:
        return False


def _short_folder(default: Path, stack: ExitStack) -> str:
    for parent in SHORT_FOLDERS:
        with suppress(OSError):
            return str(stack.enter_context(scratch("csmae_ray", Path(parent), shared=False)))
    raise ConfigError(
        f"Ray cannot have its sockets in {default}, whose name is too long or which is not writable, nor in "
        f"{', '.join(SHORT_FOLDERS)}: name a short folder in RAY_TMPDIR"
    )
