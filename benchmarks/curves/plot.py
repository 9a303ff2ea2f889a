"""A picture of regret against budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from curves.clock import BUDGET
from curves.measures import regret_curve
from curves.records import Runs
from curves.summary import Family


def plot_regret(families: Sequence[Family], runs: Runs, path: Path) -> None:
    """Draw the mean regret of each method, one panel a family; our default is emphasized."""
    figure = Figure(figsize=(5 * len(families), 4), layout="constrained")
    budgets = np.linspace(0, BUDGET, 4 * BUDGET + 1)
    for axes, family in zip(figure.subplots(1, len(families), squeeze=False)[0], families, strict=True):
        for method, groups in family.by_method(runs).items():
            curves = [regret_curve(family.tables[name], group, budgets) for name, group in groups.items()]
            width = 2.5 if method == "auto" else 1.0
            axes.plot(budgets, np.mean(curves, axis=0), label=method, linewidth=width)
        axes.set(title=family.name, xlabel="budget, in complete trainings", ylabel="mean normalized regret", ylim=0)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
