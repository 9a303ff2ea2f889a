"""The live view: a table at a terminal, one line an event in a log file."""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from csmae.console.format import format_duration, format_number, format_settings
from csmae.console.progress import SearchProgress, TrialProgress
from csmae.tuning.events import EpochReported, Event, TrialStarted, TrialWaiting

LOG_WIDTH = 80

log = logging.getLogger(__name__)

STYLES = {"running": "cyan", "waiting": "yellow", "COMPLETE": "green", "PRUNED": "yellow", "FAIL": "red"}


class LiveView:
    """Shows a search while it runs. A listener, and a context manager for as long as it shows.

    An error in showing is logged and ends nothing: neither the search nor what comes after it.

    Args:
        name: Of the study.
        progress: Fed with the events.
        console: Where to; a table that renews itself where it is a terminal, else lines.
    """

    def __init__(self, name: str, progress: SearchProgress, console: Console) -> None:
        self._name, self._progress, self._console = name, progress, console
        self._live = (
            Live(get_renderable=self._screen, console=console, refresh_per_second=2) if terminal(console) else None
        )
        self._failed = False

    def __enter__(self) -> Self:
        if self._live:
            with self._showing():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with self._showing():
                self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        best = self._progress.update(event)
        with self._showing():
            if self._live is None:
                self._line(self._say(event))
            if best and (trial := self._progress.best):
                self._line(
                    f"best so far: trial {trial.number}, {format_number(trial.value)} with {format_settings(trial.values)}"
                )

    @contextmanager
    def _showing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the trials are worth more than their table
            if not self._failed:
                log.warning("the view of the search failed (%s: %s); the search goes on", type(error).__name__, error)
            self._failed = True

    def _line(self, text: str) -> None:
        first = f"{time.strftime('%H:%M:%S')} "
        wrapped = textwrap.fill(text, LOG_WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
        self._console.print(wrapped, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _say(self, event: Event) -> str:
        trial, objective = self._progress.trial(event.number), self._progress.objective
        if isinstance(event, TrialStarted):
            return f"trial {event.number} {'resumes' if event.resumed else 'starts'}: {format_settings(event.values)}"
        if isinstance(event, EpochReported):
            value = f"  {objective} {format_number(trial.value)}" if objective in event.metrics else ""
            return f"trial {event.number} epoch {event.epoch}/{trial.epochs}{value}"
        if isinstance(event, TrialWaiting):
            return f"trial {event.number} waits: {event.reason}"
        what = {"COMPLETE": "completed", "PRUNED": f"pruned after epoch {trial.epoch}", "FAIL": "failed"}[event.state]
        tail = f": {event.reason}" if event.reason else f", {format_number(event.value)}"
        return (
            f"[{self._progress.num_ended}/{self._progress.num_trials}{self._left()}] trial {event.number} {what}{tail}"
        )

    def _counts(self) -> str:
        counts, total = self._progress.counts, self._progress.num_trials
        words = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed"}
        parts = [f"{counts.get(state, 0)} {word}" for state, word in words.items()]
        return f"{self._progress.num_ended}/{total}: {', '.join(parts)}"

    def _left(self) -> str:
        left = self._progress.seconds_left
        return "" if left is None else f", {format_duration(left)} left"

    def _spent(self) -> str:
        budget = self._progress.budget
        search = budget.trial_store.study.search
        limit = f" of {search.time_limit}" if search.time_limit else ""
        hours = f", {budget.hours:.2f} of {search.gpu_hours:g} {budget.unit}-hours" if search.gpu_hours else ""
        return f"{format_duration(budget.seconds)}{limit} spent{hours}"

    def _screen(self) -> RenderableType:
        """Called by a thread of its own, which an error would end."""
        with self._showing():
            return self._search()
        return Text("")

    def _search(self) -> Group:
        progress = self._progress
        rate = f", {progress.epochs_per_s:.2g} epochs/s" if progress.epochs_per_s else ""
        head = Text(f"study {self._name}  {self._counts()}", style="bold", overflow="ellipsis", no_wrap=True)
        clock = Text(f"{self._spent()}{self._left()}{rate}", style="dim", overflow="ellipsis", no_wrap=True)
        return Group(head, clock, self._table(), self._foot())

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("epoch", justify="right", no_wrap=True)
        table.add_column(self._progress.objective, justify="right", no_wrap=True)
        table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
        for trial in [*self._progress.running, *reversed(self._progress.ended)]:
            table.add_row(*self._row(trial))
        return table

    def _row(self, trial: TrialProgress) -> tuple[str, Text, str, str, Text]:
        state = Text(trial.state.lower(), style=STYLES[trial.state])
        told = Text(trial.reason or format_settings(trial.values))
        return str(trial.number), state, f"{trial.epoch}/{trial.epochs}", format_number(trial.value), told

    def _foot(self) -> Text:
        best = self._progress.best
        if best is None:
            waiting = not self._progress.epochs_done and self._progress.first_epoch_at is None
            return Text("the workers are starting" if waiting else "", style="dim")
        text = f"best {format_number(best.value)}: trial {best.number} with {format_settings(best.values)}"
        return Text(text, style="bold green", overflow="ellipsis", no_wrap=True)


def terminal(console: Console) -> bool:
    """Whether a table can renew itself there: in ASCII its shortened lines would be too long."""
    return console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
