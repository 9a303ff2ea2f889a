"""Figures of a study's parameters: the objective by each of them, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial

from csmae.reporting.plots import DPI, style_axes
from csmae.reporting.study_plots import scatter
from csmae.trials.leaderboard import Leaderboard
from csmae.trials.trial import last_value, param_of, params_of

COLOR_MAP = "viridis"


def explored(points: Iterable[Mapping[str, Any]]) -> list[str]:
    """Parameters that have more than one value in the points, in the order of the space."""
    points = list(points)
    names = dict.fromkeys(name for point in points for name in point)
    return [name for name in names if len({repr(point.get(name)) for point in points}) > 1]


@dataclass(frozen=True)
class Scale:
    """An explored parameter as an axis."""

    name: str
    ticks: Mapping[float, str]
    """Text by position; empty for numbers."""
    log: bool
    position: Callable[[Any], float]
    """Position of a value on the axis; NaN for a trial without the parameter."""


def scale_of(trials: Sequence[FrozenTrial], name: str) -> Scale:
    """Choose the scale of a parameter.

    Numbers keep their order. Their axis is logarithmic if the space says so, or if choices span more than a factor of 10.
    Other values get one position each.
    """
    values = [value for trial in trials if (value := param_of(trial, name)) is not None]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values):
        domain = next(trial.distributions[name] for trial in trials if name in trial.distributions)
        if isinstance(domain, CategoricalDistribution):
            log = min(numbers) > 0 and max(numbers) / min(numbers) > 10
        else:
            log = bool(getattr(domain, "log", False))
        return Scale(name, {}, log, lambda value: math.nan if value is None else float(value))
    positions = {text: float(index) for index, text in enumerate(sorted({str(value) for value in values}))}
    ticks = {position: text for text, position in positions.items()}
    return Scale(name, ticks, False, lambda value: positions.get(str(value), math.nan))


def slices_figure(board: Leaderboard) -> Figure:
    """Plot the objective by each explored parameter."""
    names = explored(map(params_of, board.trials))
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.8 * columns, 2.6 * rows + 0.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, name in zip(grid, names, strict=False):
        scale = scale_of(board.trials, name)
        scatter(axes, board, partial(_position, scale))
        axes.set_xlabel(name, fontsize=9)
        if scale.log:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(axis="x", labelsize=8)
        if scale.ticks:
            axes.set_xticks(list(scale.ticks), list(scale.ticks.values()), rotation=25, ha="right", fontsize=8)
            axes.margins(x=0.2)
        style_axes(axes)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supylabel(board.objective, fontsize=10)
    figure.suptitle(f"{board.study_name}: objective by parameter", fontsize=12)
    return figure


def parallel_figure(board: Leaderboard) -> Figure:
    """Plot each trial that can win as a line through its parameters, colored by the objective."""
    scales = [scale_of(board.trials, name) for name in explored(map(params_of, board.trials))]
    trials = [entry.trial for entry in board.entries][::-1]
    figure = Figure(figsize=(1.7 * len(scales) + 2.6, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    values = [last_value(trial) for trial in trials] or [0.0]
    colors = ScalarMappable(Normalize(min(values), max(values)), COLOR_MAP)
    heights = np.array([_heights(scale, trials) for scale in scales]).reshape(len(scales), len(trials))
    for column, value in zip(heights.T, values, strict=False):
        axes.plot(column, color=colors.to_rgba(np.array(value)), linewidth=1.6, marker="o", markersize=3.5)
    for index, scale in enumerate(scales):
        axes.axvline(index, color="black", linewidth=0.8, zorder=0)
        for height, text in _tick_texts(scale, trials):
            axes.text(index + 0.03, height, text, fontsize=8, va="center", bbox={"fc": "white", "alpha": 0.6, "lw": 0})
    axes.set_xticks(range(len(scales)), [scale.name for scale in scales], fontsize=9, rotation=12)
    axes.set(yticks=[], xlim=(-0.15, len(scales) - 0.6), ylim=(-0.06, 1.06))
    axes.spines[:].set_visible(False)
    figure.colorbar(colors, ax=axes, label=board.objective)
    figure.suptitle(f"{board.study_name}: parameters of the trials that can win", fontsize=12)
    return figure


def _position(scale: Scale, trial: FrozenTrial) -> float:
    return scale.position(param_of(trial, scale.name))


def _heights(scale: Scale, trials: Sequence[FrozenTrial]) -> list[float]:
    """Positions scaled to the range from 0 to 1."""
    positions = np.array([_position(scale, trial) for trial in trials])
    if scale.log:
        positions = np.log(positions)
    low, high = (np.nanmin(positions), np.nanmax(positions)) if np.isfinite(positions).any() else (0.0, 1.0)
    return list((positions - low) / (high - low) if high > low else np.where(np.isnan(positions), positions, 0.5))


def _tick_texts(scale: Scale, trials: Sequence[FrozenTrial]) -> list[tuple[float, str]]:
    """Heights and texts: every value of names, both ends of numbers."""
    pairs = [
        (height, param_of(trial, scale.name))
        for height, trial in zip(_heights(scale, trials), trials, strict=True)
        if math.isfinite(height)
    ]
    if scale.ticks:
        return sorted({(height, str(value)) for height, value in pairs})
    ends = {pair[0]: pair[1] for pair in (min(pairs), max(pairs))} if pairs else {}
    return [(height, f"{value:.3g}") for height, value in ends.items()]
