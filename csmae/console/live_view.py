"""Shows a running search: a live table in a terminal, one line per event in a log file."""

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
from csmae.console.progress import SearchProgress
from csmae.trial_status import STATUS_NAMES, TrialStatus
from csmae.tuning.events import EpochReported, SearchEvent, TrialPaused, TrialStarted, TrialWaiting

LINE_WIDTH = 80

STYLES = {
    TrialStatus.RUNNING: "cyan",
    TrialStatus.WAITING: "yellow",
    TrialStatus.PAUSED: "blue",
    TrialStatus.COMPLETE: "green",
    TrialStatus.PRUNED: "yellow",
    TrialStatus.FAIL: "red",
}

log = logging.getLogger(__name__)


class LiveView:
    """Listener that shows a search while it runs, between entering and leaving its context.

    An error in the view is logged and never stops the search.

    Args:
        progress: Updated with each event.
        console: Shows a live table if it is a terminal, else lines.
    """

    def __init__(self, progress: SearchProgress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._live: Live | None = None
        if _supports_live_table(console):
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2)
        self._failed = False

    def __enter__(self) -> Self:
        if self._live:
            with self._log_errors():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with self._log_errors():
                self._live.stop()

    def __call__(self, event: SearchEvent) -> None:
        """Show an event."""
        has_new_best = self._progress.update(event)
        with self._log_errors():
            if self._live is None:
                self._print_line(self._format_event(event))
            if has_new_best and (best := self._progress.best):
                value, settings = format_number(best.value), format_settings(best.values)
                self._print_line(f"best so far: trial {best.number}, {value} with {settings}")

    @contextmanager
    def _log_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: the search is worth more than its view
            if not self._failed:
                log.warning("the view of the search failed (%s: %s); the search continues", type(error).__name__, error)
            self._failed = True

    def _print_line(self, text: str) -> None:
        clock = f"{time.strftime('%H:%M:%S')} "
        wrapped = textwrap.fill(text, LINE_WIDTH, initial_indent=clock, subsequent_indent=" " * len(clock))
        self._console.print(wrapped, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def _format_event(self, event: SearchEvent) -> str:
        trial, objective = self._progress.trial(event.number), self._progress.objective
        if isinstance(event, TrialStarted):
            return f"trial {event.number} {_describe_start(event)}: {format_settings(event.values)}"
        if isinstance(event, EpochReported):
            value = f"  {objective} {format_number(trial.value)}" if objective in event.metrics else ""
            return f"trial {event.number} epoch {event.epoch}/{trial.epochs}{value}"
        if isinstance(event, TrialWaiting):
            return f"trial {event.number} waits: {event.reason}"
        if isinstance(event, TrialPaused):
            return f"trial {event.number} pauses after epoch {event.epoch}/{trial.epochs}"
        status = STATUS_NAMES[event.status]
        if event.status is TrialStatus.PRUNED:
            status += f" after epoch {trial.epoch}"
        detail = f": {event.reason}" if event.reason else f", {format_number(event.value)}"
        progress = f"{self._progress.num_ended}/{self._progress.num_trials}{self._format_remaining()}"
        return f"[{progress}] trial {event.number} {status}{detail}"

    def _format_counts(self) -> str:
        counts = ", ".join(
            f"{self._progress.counts[status]} {STATUS_NAMES[status]}"
            for status in (TrialStatus.COMPLETE, TrialStatus.PAUSED, TrialStatus.PRUNED, TrialStatus.FAIL)
            if self._progress.counts[status] or status is not TrialStatus.PAUSED
        )
        return f"{self._progress.num_ended}/{self._progress.num_trials}: {counts}"

    def _format_remaining(self) -> str:
        remaining_s = self._progress.remaining_s
        return "" if remaining_s is None else f", {format_duration(remaining_s)} left"

    def _format_budget(self) -> str:
        budget, search = self._progress.budget, self._progress.study.search
        limit = f" of {search.time_limit}" if search.time_limit else ""
        hours = f", {budget.hours:.2f} of {search.gpu_hours:g} {budget.unit}-hours" if search.gpu_hours else ""
        return f"{format_duration(budget.seconds)}{limit} used{hours}"

    def _render(self) -> RenderableType:
        """Render the live table, in rich's thread, which an error would end."""
        with self._log_errors():
            rate = self._progress.epochs_per_s
            head = f"study {self._progress.study.name}  {self._format_counts()}"
            time_line = f"{self._format_budget()}{self._format_remaining()}{f', {rate:.2g} epochs/s' if rate else ''}"
            return Group(
                Text(head, style="bold", overflow="ellipsis", no_wrap=True),
                Text(time_line, style="dim", overflow="ellipsis", no_wrap=True),
                self._render_trials(),
                self._render_best(),
            )
        return Text("")

    def _render_trials(self) -> Table:
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        table.add_column("trial", justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("epoch", justify="right", no_wrap=True)
        table.add_column(self._progress.objective, justify="right", no_wrap=True)
        table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
        for trial in [*self._progress.running, *reversed(self._progress.ended)]:
            promoted = trial.promoted and trial.status is TrialStatus.RUNNING
            state = Text("promoted" if promoted else STATUS_NAMES[trial.status], style=STYLES[trial.status])
            settings = Text(trial.reason or format_settings(trial.values))
            goal = f"{trial.until} of {trial.epochs}" if trial.until < trial.epochs else f"{trial.epochs}"
            epoch, value = f"{trial.epoch}/{goal}", format_number(trial.value)
            table.add_row(str(trial.number), state, epoch, value, settings)
        return table

    def _render_best(self) -> Text:
        best = self._progress.best
        if best is None:
            return Text("the workers are starting" if self._progress.first_epoch_at is None else "", style="dim")
        text = f"best {format_number(best.value)}: trial {best.number} with {format_settings(best.values)}"
        return Text(text, style="bold green", overflow="ellipsis", no_wrap=True)


def _supports_live_table(console: Console) -> bool:
    """Whether a console can redraw a table; in ASCII, rich's shortened lines would be too long."""
    return console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only


def _describe_start(event: TrialStarted) -> str:
    if event.resumed:
        return f"{'is promoted' if event.promoted else 'resumes'} until epoch {event.until} ({event.reason})"
    return f"starts until epoch {event.until}" if event.until < event.epochs else "starts"
