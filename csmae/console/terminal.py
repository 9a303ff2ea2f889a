"""Terminal output of all commands: lines, tables and progress bars on streams of any encoding, also closed ones."""

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
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SUBSTITUTES = {"✓": "+", "✗": "x", "×": "x", "→": "->", "…": "...", "±": "+-", "–": "-", "—": "-"}
"""Printed instead of characters that the stream's encoding lacks; other characters are printed as escape sequences."""

ERROR_HANDLER = "csmae.console.terminal"
"""Name under which the handler of encoding errors is registered."""

FLUSH_TIMEOUT_S = 5.0
"""How long a process waits at its end for a slow reader of its output."""

MAX_WIDTH = 10_000
"""Columns of the widest table, more than any table needs."""


def plain_console() -> Console:
    """Make a console without markup: error messages, paths and names may contain ``[brackets]`` and ``:colons:``."""
    return Console(highlight=False, markup=False, emoji=False)


def print_line(text: str) -> None:
    """Print a line without wrapping it."""
    plain_console().print(text, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table in its full width, even if the terminal is narrower: no cell is shortened."""
    console = plain_console()
    unlimited = console.options.update(max_width=MAX_WIDTH)
    console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """Show a progress bar if standard error is a terminal.

    Args:
        label: Names what is counted.
        total: Number of steps.

    Yields:
        A function that advances the bar by a number of steps.
    """
    columns = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = Console(file=sys.stderr)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def tolerate_encoding_errors() -> Iterator[None]:
    """Print every text inside the block, whatever the encoding of the standard streams.

    Standard streams that were closed when the process started are replaced for good by streams that discard their input.
    """
    _replace_closed_streams()
    codecs.register_error(ERROR_HANDLER, _substitute)
    with ExitStack() as stack:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors=ERROR_HANDLER)
        yield


@contextmanager
def tolerate_closed_terminal() -> Iterator[None]:
    """Discard output inside the block once the terminal is closed, the pipe is broken or the log's disk is full.

    A search thus survives the window in which it was started.
    """
    _replace_closed_streams()
    before, streams = (sys.stdout, sys.stderr), (_TolerantStream(sys.stdout), _TolerantStream(sys.stderr))
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.finish()


def _replace_closed_streams() -> None:
    """Open ``/dev/null`` for each standard stream that was closed when the process started, which Python shows as None.

    It gets the lowest free file descriptors, which are those of the closed streams. Otherwise the next file, such as a
    database, would get them and receive whatever a library or a child process writes to standard error.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


class _TolerantStream:
    """A stream that discards its output after an error. A slow reader is not an error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BlockingIOError:  # a full non-blocking pipe: what does not fit into the buffer is lost
            return len(text)
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BlockingIOError:
            pass  # the buffer keeps the text until the next flush
        except OSError:
            self._discard()

    def finish(self) -> None:
        """Give a slow reader some time to read what the buffer holds."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                self._stream.flush()
                return
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        self._discard()

    def _discard(self) -> None:
        """Redirect the stream to ``/dev/null``: flushing its buffer would fail again, at the latest when Python exits."""
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(SUBSTITUTES.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end
