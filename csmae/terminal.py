"""What commands say on the terminal: lines and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str) -> None:
    """Print a line as it is, however long."""
    Console(highlight=False, markup=False, soft_wrap=True).print(text)


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A progress bar where there is a terminal.

    Args:
        what: Is counted.
        total: Of all.
        done: Of which so many are there already.

    Yields:
        What moves the bar on by so many.
    """
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda steps: bar.advance(task, steps)
