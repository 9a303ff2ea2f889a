"""Pictures of a study: how the search went and what it says about the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from csmae.tracking.pictures import BLUE, DPI, GREEN, GREY, ORANGE, RED, plain
from csmae.tracking.record import StudyRecord, Trial

LOOKS = {"COMPLETE": ("o", BLUE), "PRUNED": ("x", GREY), "RUNNING": ("^", ORANGE)}
"""Mark and colour of a trial's state."""
STATES = {"COMPLETE": "trained to the end", "PRUNED": "stopped early", "RUNNING": "not ended", "FAIL": "failed"}
COLOURS = "viridis"


def study_pictures(record: StudyRecord) -> Iterator[tuple[str, Figure]]:
    """The pictures that a study has enough trials for, each with its file name."""
    if not any(math.isfinite(record.value(trial)) for trial in record.trials.values()):
        return
    makers: dict[str, Callable[[StudyRecord], Figure]] = {
        "history": history_picture,
        "budget": budget_picture,
        "pareto": pareto_picture,
    }
    if record.importance():
        makers["importance"] = importance_picture
    if record.explored():
        makers |= {"parallel": parallel_picture, "slices": slices_picture}
    for name, make in makers.items():
        yield name, make(record)


def history_picture(record: StudyRecord) -> Figure:
    """The objective of each trial in the order of their numbers, and the best so far."""
    figure = Figure(figsize=(7.2, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _scatter(axes, record, lambda trial: trial.number)
    failed = [t.number for t in record.trials.values() if t.state == "FAIL"]
    if failed:
        low = axes.get_ylim()[0]
        axes.plot(failed, [low] * len(failed), "|", color=RED, markersize=12, clip_on=False, label=STATES["FAIL"])
    numbers = sorted(t.number for t in record.ranked())
    best = _best_so_far(record, [record.trials[number] for number in numbers])
    if best:
        numbers.append(max(record.trials))
        axes.step(numbers, [*best, best[-1]], where="post", color=GREEN, linewidth=2, label="best so far", zorder=1)
    axes.set(xlabel="trial", ylabel=record.objective)
    _dress(figure, axes, f"{record.name}: objective by trial")
    return figure


def budget_picture(record: StudyRecord) -> Figure:
    """The best objective against the epochs that all trials together had cost by then."""
    figure = Figure(figsize=(7.2, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    trials = sorted(record.trials.values(), key=lambda trial: trial.end_ms)
    epochs = np.cumsum([trial.num_epochs for trial in trials])
    done = [(int(cost), t) for cost, t in zip(epochs, trials, strict=True) if t in record.ranked()]
    costs = [cost for cost, _ in done]
    best = _best_so_far(record, [trial for _, trial in done])
    if best:
        axes.step([*costs, int(epochs[-1])], [*best, best[-1]], where="post", color=GREEN, linewidth=2)
    axes.set(xlabel="epochs trained by all trials together", ylabel=f"best {record.objective}", xlim=(0, None))
    _dress(figure, axes, f"{record.name}: what the budget bought")
    return figure


def pareto_picture(record: StudyRecord) -> Figure:
    """The objective against a trial's training time; the line joins those that no other beats in both."""
    figure = Figure(figsize=(7.2, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _scatter(axes, record, lambda trial: trial.seconds)
    front: list[Trial] = []
    for trial in sorted(record.ranked(), key=lambda trial: trial.seconds):
        if not front or record.sign * (record.value(trial) - record.value(front[-1])) > 0:
            front.append(trial)
    axes.plot([t.seconds for t in front], [record.value(t) for t in front], color=GREEN, label="Pareto front", zorder=1)
    axes.margins(y=0.12)  # room for the texts
    for trial in front:
        point = (trial.seconds, record.value(trial))
        axes.annotate(f"trial {trial.number}", point, xytext=(4, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="training time, s", ylabel=record.objective)
    _dress(figure, axes, f"{record.name}: quality against time")
    return figure


def importance_picture(record: StudyRecord) -> Figure:
    """Each parameter's share in what tells good trials from all (PED-ANOVA)."""
    shares = record.importance()
    names = list(shares)[::-1]
    figure = Figure(figsize=(7.2, 0.38 * len(names) + 1.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [shares[name] for name in names], color=BLUE)
    axes.bar_label(bars, fmt="{:.0%}", padding=3, fontsize=9)
    axes.set(xlabel="share of the difference between good trials and all", xlim=(0, 1.1 * max(shares.values())))
    plain(axes)
    axes.grid(visible=False)
    figure.suptitle(f"{record.name}: which parameters matter", fontsize=12)
    return figure


@dataclass(frozen=True)
class Scale:
    """An explored parameter as an axis."""

    name: str
    ticks: Mapping[float, str]
    """Text by position; empty for numbers."""
    log: bool
    position: Callable[[Any], float]
    """A value's place on the axis; NaN for a trial that lacks the parameter."""


def scale_of(record: StudyRecord, name: str) -> Scale:
    """Numbers keep their order, logarithmic as the space says, or choices of several magnitudes; the rest get a place each."""
    values = [trial.params[name] for trial in record.trials.values() if trial.params.get(name) is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        domain = str(record.params.get(f"space.{name}", ""))
        choices = not domain.startswith(("float", "int"))
        log = ", log" in domain or (choices and min(values) > 0 and max(values) / min(values) > 10)
        return Scale(name, {}, log, lambda value: math.nan if value is None else float(value))
    places = {text: float(place) for place, text in enumerate(sorted({str(value) for value in values}))}
    ticks = {place: text for text, place in places.items()}
    return Scale(name, ticks, False, lambda value: places.get(str(value), math.nan))


def slices_picture(record: StudyRecord) -> Figure:
    """The objective against each explored parameter."""
    names = record.explored()
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.8 * columns, 2.6 * rows + 0.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, name in zip(grid, names, strict=False):
        scale = scale_of(record, name)
        _scatter(axes, record, lambda trial, scale=scale: scale.position(trial.params.get(scale.name)))  # type: ignore[misc]
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
        plain(axes)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.supylabel(record.objective, fontsize=10)
    figure.suptitle(f"{record.name}: objective by parameter", fontsize=12)
    return figure


def parallel_picture(record: StudyRecord) -> Figure:
    """Each trial that came to its end as a line through its parameters, coloured by the objective."""
    scales = [scale_of(record, name) for name in record.explored()]
    trials = record.ranked()[::-1]
    figure = Figure(figsize=(1.7 * len(scales) + 2.6, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    values = [record.value(trial) for trial in trials] or [0.0]
    colours = ScalarMappable(Normalize(min(values), max(values)), COLOURS)
    heights = np.array([_heights(scale, trials) for scale in scales]).reshape(len(scales), len(trials))
    for column, value in zip(heights.T, values, strict=False):
        axes.plot(column, color=colours.to_rgba(np.array(value)), linewidth=1.6, marker="o", markersize=3.5)
    for place, scale in enumerate(scales):
        axes.axvline(place, color="black", linewidth=0.8, zorder=0)
        for height, text in _tick_texts(scale, trials):
            axes.text(place + 0.03, height, text, fontsize=8, va="center", bbox={"fc": "white", "alpha": 0.6, "lw": 0})
    axes.set_xticks(range(len(scales)), [scale.name for scale in scales], fontsize=9, rotation=12)
    axes.set(yticks=[], xlim=(-0.15, len(scales) - 0.6), ylim=(-0.06, 1.06))
    axes.spines[:].set_visible(False)
    figure.colorbar(colours, ax=axes, label=record.objective)
    figure.suptitle(f"{record.name}: trials trained to their end", fontsize=12)
    return figure


def _heights(scale: Scale, trials: list[Trial]) -> list[float]:
    """Places between 0 and 1."""
    places = np.array([scale.position(trial.params.get(scale.name)) for trial in trials])
    if scale.log:
        places = np.log(places)
    low, high = (np.nanmin(places), np.nanmax(places)) if np.isfinite(places).any() else (0.0, 1.0)
    return list((places - low) / (high - low) if high > low else np.where(np.isnan(places), places, 0.5))


def _tick_texts(scale: Scale, trials: list[Trial]) -> list[tuple[float, str]]:
    """Heights and texts: each place of a name, the ends of a number."""
    pairs = [
        (height, trial.params.get(scale.name))
        for height, trial in zip(_heights(scale, trials), trials, strict=True)
        if math.isfinite(height)
    ]
    if scale.ticks:
        return sorted({(height, str(value)) for height, value in pairs})
    ends = {pair[0]: pair[1] for pair in (min(pairs), max(pairs))} if pairs else {}
    return [(height, f"{value:.3g}") for height, value in ends.items()]


def _scatter(axes: Axes, record: StudyRecord, x_of: Callable[[Trial], float]) -> None:
    for state, (mark, colour) in LOOKS.items():
        trials = [t for t in record.trials.values() if t.state == state]
        points = [(x_of(trial), record.value(trial)) for trial in trials]
        points = [point for point in points if all(map(math.isfinite, point))]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, marker=mark, color=colour, s=28, label=STATES[state], zorder=2)


def _best_so_far(record: StudyRecord, trials: list[Trial]) -> list[float]:
    values = [record.sign * record.value(trial) for trial in trials]
    return [record.sign * value for value in np.maximum.accumulate(values)] if values else []


def _dress(figure: Figure, axes: Axes, title: str) -> None:
    plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(title, fontsize=12)
