"""What commands say on the terminal: lines, tables and a progress bar, on whatever the streams of the process are."""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

STAND_INS = {"✓": "+", "✗": "x", "×": "x", "→": "->", "…": "...", "±": "+-", "–": "-", "—": "-"}
"""What is printed instead where the stream's encoding lacks a character; of any other, its code."""

REPLACE = "csmae.console.terminal"
"""Name of the handler of encoding errors."""

FINISH_S = 5.0
"""How long a process waits at its end for whoever reads its output."""


def plain_console() -> Console:
    """A console that prints texts as they are: error messages, paths and names may hold ``[brackets]`` and ``:colons:``."""
    return Console(highlight=False, markup=False, emoji=False)


def print_line(text: str) -> None:
    """Print a line as it is, however long."""
    plain_console().print(text, soft_wrap=True)


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A progress bar where there is a terminal.

    Args:
        what: Is counted.
        total: Of all.
        done: Of which so many are there already.

    Yields:
        What moves the bar on by so many.
    """
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(file=sys.stderr)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def tolerate_encoding_errors() -> Iterator[None]:
    """Have the process's streams print every text, whatever their encoding, for as long as the block lasts.

    Streams that were closed when the process started are replaced for good by ones that discard what they are given.
    """
    _replace_closed()
    codecs.register_error(REPLACE, _stand_ins)
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors=REPLACE)
        yield


@contextmanager
def tolerate_closed_terminal() -> Iterator[None]:
    """Have what is printed go nowhere once the terminal is closed, the pipe broken or the log's disk full.

    It lasts as long as the block, and keeps a search from ending with the window that it was started in.
    """
    _replace_closed()
    before, streams = (sys.stdout, sys.stderr), (_Lasting(sys.stdout), _Lasting(sys.stderr))
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.finish()


def _replace_closed() -> None:
    """Open ``/dev/null`` for each stream that was closed when the process started, which Python shows as None.

    It gets the lowest free descriptors, which are those of the closed streams: otherwise the next file would get them, such
    as a database, and receive whatever a library or a child process writes to standard error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


class _Lasting:
    """A stream that is given up where it fails, but not where its reader is only slow."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BlockingIOError:  # a non-blocking pipe that is full: what does not fit in its buffer is lost
            return len(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BlockingIOError:
            pass  # the buffer keeps it for the next time
        except OSError:
            self._give_up()

    def finish(self) -> None:
        """Wait a moment until a slow reader has taken what the buffer holds."""
        deadline = time.monotonic() + FINISH_S
        while time.monotonic() < deadline:
            try:
                self._stream.flush()
                return
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        self._give_up()

    def _give_up(self) -> None:
        """Let the stream's file be ``/dev/null``: what its buffer still holds would fail again, at the latest at the end."""
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def _stand_ins(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(STAND_INS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end
