"""A folder for the files and sockets of a Ray of our own, where the usual one cannot hold them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from csmae.config import ConfigError
from csmae.scratch import scratch

SOCKET_BYTES = 107
"""Longest path of a Unix socket."""

LONGEST = "ray/session_2026-01-31_23-59-59_000000_4194304/sockets/plasma_store.99"
"""What Ray puts below its temporary folder, at its longest."""

SHORT = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders for everybody, with short names."""


@contextmanager
def ray_temp_dir(usual: Path | None = None) -> Iterator[str | None]:
    """Choose a folder for as long as the block lasts.

    Args:
        usual: In which Ray would make its own: ``RAY_TMPDIR``, ``TMPDIR`` or ``/tmp`` where None.

    Yields:
        A folder with a short name, removed afterwards; None where Ray's own choice does.

    Raises:
        ConfigError: No folder can be written.
    """
    usual = usual or Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    if len(os.fsencode(usual.absolute() / LONGEST)) <= SOCKET_BYTES and _writable(usual):
        yield None
        return
    with ExitStack() as stack:
        yield _short_folder(usual, stack)


def _writable(usual: Path) -> bool:
    """Whether Ray can make its folder there, or write in the one that another account made."""
    try:
        (usual / "ray").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=usual / "ray"):
            return True
    except OSError:
        return False


def _short_folder(usual: Path, stack: ExitStack) -> str:
    for place in SHORT:
        with suppress(OSError):
            return str(stack.enter_context(scratch("csmae_ray", Path(place), shared=False)))
    raise ConfigError(
        f"Ray cannot have its sockets in {usual}, whose name is too long or which cannot be written, nor in "
        f"{', '.join(SHORT)}: name a short folder in RAY_TMPDIR"
    )
