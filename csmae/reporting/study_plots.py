"""Figures of a study: the progress of its search, and the cost and results of its trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial

from csmae.reporting.plots import BLUE, DPI, GRAY, GREEN, ORANGE, RED, SKY, style_axes
from csmae.trial_status import STATUS_NAMES, TrialStatus
from csmae.trials.leaderboard import Leaderboard
from csmae.trials.trial import last_value, num_epochs, status_of, used_seconds

Style = tuple[str, str, str]
"""Marker, color and label of a group of trials."""
STYLES: dict[TrialStatus, Style] = {
    TrialStatus.COMPLETE: ("o", BLUE, STATUS_NAMES[TrialStatus.COMPLETE]),
    TrialStatus.PRUNED: ("x", GRAY, STATUS_NAMES[TrialStatus.PRUNED]),
    TrialStatus.PAUSED: ("+", SKY, STATUS_NAMES[TrialStatus.PAUSED]),
    TrialStatus.RUNNING: ("^", ORANGE, STATUS_NAMES[TrialStatus.RUNNING]),
}
CONFIRMATION: Style = ("d", SKY, "confirmation with another seed")
VIOLATION: Style = ("s", RED, "violates a constraint")


def history_figure(board: Leaderboard) -> Figure:
    """Plot the objective by trial number, and the best value so far."""
    figure, axes = _single_panel()
    scatter(axes, board, lambda trial: trial.number)
    if failed := [trial.number for trial in board.trials if status_of(trial) is TrialStatus.FAIL]:
        bottom, label = axes.get_ylim()[0], STATUS_NAMES[TrialStatus.FAIL]
        axes.plot(failed, [bottom] * len(failed), "|", color=RED, markersize=12, clip_on=False, label=label)
    eligible = sorted((entry.trial for entry in board.entries), key=lambda trial: trial.number)
    if best := _best_so_far(board, eligible):
        numbers = [*(trial.number for trial in eligible), board.trials[-1].number]
        axes.step(numbers, [*best, best[-1]], where="post", color=GREEN, linewidth=2, label="best so far", zorder=1)
    _mark_best(axes, board, lambda trial: trial.number)
    axes.set(xlabel="trial", ylabel=board.objective)
    return _with_title(figure, axes, f"{board.study_name}: objective by trial")


def budget_figure(board: Leaderboard) -> Figure:
    """Plot the best value so far by the epochs of all trials that had ended."""
    figure, axes = _single_panel(3.4)
    trials = sorted(board.trials, key=lambda trial: trial.datetime_complete or datetime.max)
    epochs = np.cumsum([num_epochs(trial) for trial in trials])
    eligible = {entry.trial.number for entry in board.entries}
    ended = [(int(total), trial) for total, trial in zip(epochs, trials, strict=True) if trial.number in eligible]
    if best := _best_so_far(board, [trial for _, trial in ended]):
        totals = [*(total for total, _ in ended), int(epochs[-1])]
        axes.step(totals, [*best, best[-1]], where="post", color=GREEN, linewidth=2)
    axes.set(xlabel="epochs trained by all trials together", ylabel=f"best {board.objective}", xlim=(0, None))
    return _with_title(figure, axes, f"{board.study_name}: best objective by training budget")


def time_figure(board: Leaderboard) -> Figure:
    """Plot the objective by training time, for a study with a single objective."""
    figure, axes = _single_panel()
    scatter(axes, board, used_seconds)
    _mark_best(axes, board, used_seconds)
    axes.set(xlabel="training time, s (all GPUs or workers of the trial together)", ylabel=board.objective)
    return _with_title(figure, axes, f"{board.study_name}: objective against training time")


def pareto_figure(board: Leaderboard) -> Figure:
    """Plot the first objective by each further one, with the Pareto front."""
    objective, *others = board.objectives
    figure = Figure(figsize=(2.6 + 4.6 * len(others), 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(others), squeeze=False, sharey=True)[0]
    front = [entry.trial for entry in board.entries if entry.trial.number in board.front]
    for index, (axes, name) in enumerate(zip(panels, others, strict=True), start=1):
        scatter(axes, board, partial(last_value, objective=index))
        points = sorted((last_value(trial, index), last_value(trial), trial.number) for trial in front)
        axes.plot(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            color=GREEN,
            marker="o",
            markersize=10,
            fillstyle="none",
            linestyle="-" if len(others) == 1 else "none",
            drawstyle="steps-post",
            label="Pareto front",
            zorder=1,
        )
        axes.margins(0.12)  # space for the annotations
        for x, y, number in points:
            axes.annotate(f"trial {number}", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
        axes.set_xlabel(f"{name} ({board.objectives[name]})")
        style_axes(axes)
    panels[0].set_ylabel(f"{objective} ({board.objectives[objective]})")
    _add_legend(figure, panels[0])
    figure.suptitle(f"{board.study_name}: Pareto front of {', '.join(board.objectives)}", fontsize=12)
    return figure


def importance_figure(study_name: str, importances: Mapping[str, float]) -> Figure:
    """Plot each parameter's share of the difference between good trials and all (PED-ANOVA)."""
    names = list(importances)[::-1]
    figure, axes = _single_panel(0.38 * len(names) + 1.2)
    bars = axes.barh(names, [importances[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="{:.0%}", padding=3, fontsize=9)
    axes.set(xlabel="share of the difference between good trials and all", xlim=(0, 1.1 * max(importances.values())))
    style_axes(axes)
    axes.grid(visible=False)
    figure.suptitle(f"{study_name}: parameter importance", fontsize=12)
    return figure


def scatter(axes: Axes, board: Leaderboard, x_of: Callable[[FrozenTrial], float]) -> None:
    """Plot one point per trial with a score, by groups: its position from ``x_of``, and its objective."""
    groups: dict[Style, list[tuple[float, float]]] = {}
    for trial in board.trials:
        point = (x_of(trial), last_value(trial))
        if status_of(trial) in STYLES and all(map(math.isfinite, point)):
            groups.setdefault(_style(board, trial), []).append(point)
    for style in (*STYLES.values(), CONFIRMATION, VIOLATION):
        if style in groups:
            marker, color, label = style
            x, y = zip(*groups[style], strict=True)
            axes.scatter(x, y, marker=marker, color=color, s=28, label=label, zorder=2)


def _style(board: Leaderboard, trial: FrozenTrial) -> Style:
    if trial.number in board.confirms:
        return CONFIRMATION
    if trial.number in board.violated_constraints:
        return VIOLATION
    return STYLES[status_of(trial)]


def _mark_best(axes: Axes, board: Leaderboard, x_of: Callable[[FrozenTrial], float]) -> None:
    """Mark the best trial at its mean over the seeds."""
    for best in board.entries[:1]:
        seeds = f", mean of {best.num_seeds} seeds" if best.num_seeds > 1 else ""
        label = f"best: trial {best.trial.number}{seeds}"
        axes.plot(
            [x_of(best.trial)], [best.mean], "o", color=GREEN, markersize=11, fillstyle="none", label=label, zorder=3
        )


def _best_so_far(board: Leaderboard, trials: Sequence[FrozenTrial]) -> list[float]:
    best = np.maximum if board.objectives[board.objective] == "maximize" else np.minimum
    return list(best.accumulate([last_value(trial) for trial in trials])) if trials else []


def _single_panel(height: float = 3.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _with_title(figure: Figure, axes: Axes, title: str) -> Figure:
    style_axes(axes)
    _add_legend(figure, axes)
    figure.suptitle(title, fontsize=12)
    return figure


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, fontsize=9, ncols=3, loc="outside lower center")
