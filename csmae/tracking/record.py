"""What an outbox says of its study: trials, curves, states, champion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csmae.tracking.outbox import OUTBOX, Event, TrackingError


@dataclass
class Trial:
    """One trial as far as it went."""

    number: int
    params: dict[str, Any]
    start_ms: int
    end_ms: int
    state: str = "RUNNING"
    """COMPLETE, PRUNED, FAIL, or RUNNING for one that has not ended."""
    reason: str | None = None
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """By metric, by epoch."""

    def last(self, metric: str) -> float:
        """A metric's last value; NaN where there is none."""
        curve = self.curves.get(metric)
        return curve[max(curve)] if curve else math.nan

    @property
    def num_epochs(self) -> int:
        """Epochs done."""
        return max((max(curve) for curve in self.curves.values()), default=0)

    @property
    def seconds(self) -> float:
        """Time spent in epochs where they say so, else from its start to its end."""
        spent = self.curves.get("time/epoch_s")
        return sum(spent.values()) if spent else (self.end_ms - self.start_ms) / 1000


@dataclass
class StudyRecord:
    """One study as far as it went."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objective: str = ""
    direction: str = "maximize"
    trials: dict[int, Trial] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    """Figures of the last finish; ``importance/NAME`` are the parameters' shares in what made trials good."""
    champion: dict[str, Any] | None = None
    """The last champion: ``number``, ``metrics``, ``tags``, ``encoder_dir``, ``sha256``."""

    @property
    def sign(self) -> int:
        """1 where large is good, else -1."""
        return -1 if self.direction == "minimize" else 1

    def value(self, trial: Trial) -> float:
        """A trial's objective; NaN where it has none."""
        return trial.last(self.objective)

    def ranked(self) -> list[Trial]:
        """Trials that came to their end, best first."""
        done = [t for t in self.trials.values() if t.state == "COMPLETE" and math.isfinite(self.value(t))]
        return sorted(done, key=lambda trial: -self.sign * self.value(trial))

    def explored(self) -> list[str]:
        """Parameters of which more than one value was tried, in the order of the space."""
        names = dict.fromkeys(name for trial in self.trials.values() for name in trial.params)
        return [name for name in names if len({repr(t.params.get(name)) for t in self.trials.values()}) > 1]

    def importance(self) -> dict[str, float]:
        """The parameters' shares, largest first."""
        shares = {k.removeprefix("importance/"): v for k, v in self.summary.items() if k.startswith("importance/")}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def read_record(folder: Path) -> StudyRecord:
    """Read a study's folder; a running search is not disturbed.

    Raises:
        TrackingError: There is no outbox in it.
    """
    record = StudyRecord(folder.name)
    for event in _events(folder / OUTBOX):
        _add(record, event.found_in(folder.absolute()))
    return record


def _events(path: Path) -> Iterator[Event]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        raise TrackingError(
            f"{path.parent}: no study: there is no {path.name} in it: name a folder such as runs/masking"
        ) from None
    yield from filter(None, map(Event.from_line, lines))


def _add(record: StudyRecord, event: Event) -> None:
    body = event.body
    if event.kind == "start":
        record.params = {**body["params"], **record.params}
        record.tags.update(body["tags"])
        record.objective, record.direction = body["primary_metric"], body["direction"]
    elif event.kind == "finish":
        record.summary = body["metrics"]
    elif event.kind == "champion":
        record.champion = {"number": event.number, **body}
    elif event.number is not None:
        _add_to_trial(record, event.number, event)


def _add_to_trial(record: StudyRecord, number: int, event: Event) -> None:
    body = event.body
    trial = record.trials.setdefault(number, Trial(number, {}, event.time_ms, event.time_ms))
    if event.kind in ("trial", "epoch", "end"):  # pictures and encoders come when all trials have ended
        trial.end_ms = max(trial.end_ms, event.time_ms)
    if event.kind == "trial":
        trial.params, trial.state, trial.reason = body["params"], "RUNNING", None
    elif event.kind == "end":
        trial.state, trial.reason = body["state"], body["reason"]
    elif event.kind == "epoch":
        for name, value in body["metrics"].items():
            trial.curves.setdefault(name, {})[int(body["epoch"])] = value
