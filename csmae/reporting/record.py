"""What an outbox says of its study: trials, curves, states, champion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from csmae.tracking.outbox import OUTBOX, Event, TrackingError
from csmae.trial_status import TrialStatus


@dataclass
class Trial:
    """One trial as far as it went."""

    number: int
    params: dict[str, Any]
    start_ms: int
    end_ms: int
    state: TrialStatus = TrialStatus.RUNNING
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


class Ranking(Protocol):
    """Which trials can win, and which is the best, as the trial store decides it."""

    @property
    def objectives(self) -> Mapping[str, str]:
        """``maximize`` or ``minimize`` by name, the first one first."""

    @property
    def scores(self) -> Mapping[int, tuple[float, ...]]:
        """First objective of those that can win, over their seeds: by number, best first."""

    @property
    def front(self) -> frozenset[int]:
        """Numbers of those that no other one beats in every objective."""

    @property
    def confirms(self) -> Mapping[int, int]:
        """Repetitions: by number, the trial that each repeats with another seed."""

    @property
    def violated_constraints(self) -> Mapping[int, tuple[str, ...]]:
        """Constraints that a trial breaks, by its number."""


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
    ranking: Ranking | None = None
    """Of the trial store; None where only the outbox is there."""

    @property
    def sign(self) -> int:
        """1 where large is good, else -1."""
        return -1 if self.direction == "minimize" else 1

    def value(self, trial: Trial) -> float:
        """A trial's objective; NaN where it has none."""
        return trial.last(self.objective)

    def ranked(self) -> list[Trial]:
        """Trials that can win, best first; without the trial store those that came to their end, by their last score."""
        if self.ranking:
            return [self.trials[number] for number in self.ranking.scores if number in self.trials]
        done = [t for t in self.trials.values() if t.state is TrialStatus.COMPLETE and math.isfinite(self.value(t))]
        return sorted(done, key=lambda trial: -self.sign * self.value(trial))

    @property
    def objectives(self) -> Mapping[str, str]:
        """``maximize`` or ``minimize`` by name, the first one first."""
        return self.ranking.objectives if self.ranking else {self.objective: self.direction}

    def seeds(self, trial: Trial) -> tuple[float, ...]:
        """A trial's objective, then those of its repetitions with other seeds."""
        return self.ranking.scores.get(trial.number, ()) if self.ranking else ()

    def note(self, trial: Trial) -> str:
        """What is special about a trial: that it repeats another one, breaks a constraint, or is on the Pareto front."""
        if self.ranking is None:
            return ""
        if (repeated := self.ranking.confirms.get(trial.number)) is not None:
            return f"repeats trial {repeated}"
        if broken := self.ranking.violated_constraints.get(trial.number):
            return f"breaks {', '.join(broken)}"
        return "Pareto front" if len(self.objectives) > 1 and trial.number in self.ranking.front else ""

    def explored(self) -> list[str]:
        """Parameters of which more than one value was tried, in the order of the space."""
        names = dict.fromkeys(name for trial in self.trials.values() for name in trial.params)
        return [name for name in names if len({repr(t.params.get(name)) for t in self.trials.values()}) > 1]

    def importance(self) -> dict[str, float]:
        """The parameters' shares, largest first."""
        shares = {k.removeprefix("importance/"): v for k, v in self.summary.items() if k.startswith("importance/")}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def read_record(folder: Path, ranking: Ranking | None = None) -> StudyRecord:
    """Read a study's folder; a running search is not disturbed.

    Args:
        folder: Of the study.
        ranking: Of its trials, as the trial store decides it.

    Raises:
        TrackingError: There is no outbox in it.
    """
    record = StudyRecord(folder.name, ranking=ranking)
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
        trial.params, trial.state, trial.reason = body["params"], TrialStatus.RUNNING, None
    elif event.kind == "end":
        trial.state, trial.reason = TrialStatus(body["state"]), body["reason"]
    elif event.kind == "epoch":
        for name, value in body["metrics"].items():
            trial.curves.setdefault(name, {})[int(body["epoch"])] = value
