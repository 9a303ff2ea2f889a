"""The figures of methods on the tables of a family, as a table for people and as values for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curves.baselines import random_runs
from curves.clock import Run
from curves.measures import CHECKPOINTS, NUM_RANDOM, Interval, reached, regret, speed_up, speed_ups, time_to_best
from curves.records import Runs
from curves.tables import Table

RANDOM = "random"
"""Name of random search, which is always computed."""


@dataclass(frozen=True)
class Figures:
    """What a method reaches on the tables of a family."""

    speed_up: Interval
    """Over random search, until a configuration of the best 1 % is fully trained."""
    reached: float
    """Share of the runs that found one within the budget."""
    worst_task: str
    worst: float
    """Smallest speed-up of a table."""
    regrets: tuple[float, ...]
    """Mean normalized regret at 3, 10 and 30 complete trainings."""
    ms: float
    """Mean milliseconds per decision, with everything that happens between two decisions."""
    ms_at_300: float | None
    """The same while there are about 300 trials; None if there are never as many."""
    seeds: int
    """Smallest number of seeds of a table."""
    tasks: int

    def as_json(self) -> dict[str, Any]:
        """The values, rounded."""
        interval = self.speed_up
        return {
            "speed_up": round(interval.value, 2),
            "interval": [round(interval.low, 2), round(interval.high, 2)],
            "reached": round(self.reached, 2),
            "worst": {self.worst_task: round(self.worst, 2)},
            "regret": {str(at): round(value, 3) for at, value in zip(CHECKPOINTS, self.regrets, strict=True)},
            "ms": round(self.ms, 1),
            "ms_at_300": self.ms_at_300,
            "seeds": self.seeds,
            "tasks": self.tasks,
        }


class Family:
    """The tables of one family with random search on them.

    Args:
        tables: Of the family.
        workers: Of all searches.
    """

    def __init__(self, tables: Sequence[Table], workers: int) -> None:
        self.name = tables[0].family
        self.tables = {table.name: table for table in tables}
        self.random = {table.name: random_runs(table, workers, NUM_RANDOM) for table in tables}
        self._random_times = {
            name: float(np.mean([time_to_best(self.tables[name], run) for run in runs]))
            for name, runs in self.random.items()
        }

    def figures(self, runs: Mapping[str, Sequence[Run]]) -> Figures:
        """Compute a method's figures from its runs by table."""
        tables = self.tables
        times = {name: [time_to_best(tables[name], run) for run in group] for name, group in runs.items()}
        ratios = speed_ups(times, self._random_times)
        worst = min(ratios, key=lambda name: ratios[name])
        flat = [(tables[name], run) for name, group in runs.items() for run in group]
        at_300 = [run.ms_at_300 for _, run in flat if run.ms_at_300 is not None]
        return Figures(
            speed_up=speed_up(times, self._random_times),
            reached=float(np.mean([reached(table, run) for table, run in flat])),
            worst_task=worst,
            worst=ratios[worst],
            regrets=tuple(float(np.mean([regret(table, run, at) for table, run in flat])) for at in CHECKPOINTS),
            ms=1000 * sum(run.decision_s for _, run in flat) / max(1, sum(run.num_decisions for _, run in flat)),
            ms_at_300=round(float(np.mean(at_300)), 1) if at_300 else None,
            seeds=min(len(group) for group in runs.values()),
            tasks=len(runs),
        )

    def by_method(self, runs: Runs) -> dict[str, dict[str, list[Run]]]:
        """Runs on the family's tables by method and table, those of random search included."""
        methods: dict[str, dict[str, list[Run]]] = {RANDOM: dict(self.random)}
        for case, run in sorted(runs.items(), key=lambda pair: pair[0].seed):
            if case.task in self.tables:
                methods.setdefault(case.method, {}).setdefault(case.task, []).append(run)
        return methods

    def summarize(self, runs: Runs) -> dict[str, Figures]:
        """Figures of random search and of every method that has runs on the family's tables, best first."""
        figures = {method: self.figures(groups) for method, groups in self.by_method(runs).items()}
        return dict(sorted(figures.items(), key=lambda pair: -pair[1].speed_up.value))


def as_markdown(name: str, workers: int, figures: Mapping[str, Figures]) -> str:
    """A table of the methods, which is also readable as text."""
    ends = " / ".join(map(str, CHECKPOINTS))
    title = f"{name}, {workers} {'worker' if workers == 1 else 'workers'}"
    header = [title, "Speed-up", "Reached", "Worst task", f"Regret at {ends}", "ms/decision", "Seeds × tasks"]
    rows = [header, ["---"] * len(header)]
    for method, found in figures.items():
        interval, ms = found.speed_up, f"{found.ms:.1f}"
        rows.append(
            [
                method,
                f"{interval.value:.2f} ({interval.low:.2f}–{interval.high:.2f})",
                f"{found.reached:.0%}".replace("%", " %"),
                f"{found.worst:.2f}",
                " / ".join(f"{value:.2f}" for value in found.regrets),
                "–" if method == RANDOM else ms if found.ms_at_300 is None else f"{ms}, {found.ms_at_300:.1f} at 300",
                f"{found.seeds} × {found.tasks}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
