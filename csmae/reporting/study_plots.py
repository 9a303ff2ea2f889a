"""Pictures of a study: how the search went and what it says about the parameters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from csmae.reporting.plots import BLUE, DPI, GREEN, GREY, ORANGE, RED, SKY, plain
from csmae.reporting.record import StudyRecord, Trial
from csmae.trial_status import TrialStatus

LOOKS = {TrialStatus.COMPLETE: ("o", BLUE), TrialStatus.PRUNED: ("x", GREY), TrialStatus.RUNNING: ("^", ORANGE)}
"""Mark and colour of a trial's state."""
REPETITION, BROKEN = ("d", SKY, "repetition with another seed"), ("s", RED, "breaks a constraint")
"""Mark, colour and text of trials that cannot win though they came to their end."""
STATES = {
    TrialStatus.COMPLETE: "trained to the end",
    TrialStatus.PRUNED: "stopped early",
    TrialStatus.RUNNING: "not ended",
    TrialStatus.FAIL: "failed",
}
COLOURS = "viridis"


def study_pictures(record: StudyRecord) -> Iterator[tuple[str, Figure]]:
    """The pictures that a study has enough trials for, each with its file name."""
    if not any(math.isfinite(record.value(trial)) for trial in record.trials.values()):
        return
    makers: dict[str, Callable[[StudyRecord], Figure]] = {
        "history": history_picture,
        "budget": budget_picture,
        **({"pareto": pareto_picture} if len(record.objectives) > 1 else {"time": time_picture}),
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
    failed = [t.number for t in record.trials.values() if t.state is TrialStatus.FAIL]
    if failed:
        low = axes.get_ylim()[0]
        axes.plot(
            failed, [low] * len(failed), "|", color=RED, markersize=12, clip_on=False, label=STATES[TrialStatus.FAIL]
        )
    numbers = sorted(t.number for t in record.ranked())
    best = _best_so_far(record, [record.trials[number] for number in numbers])
    if best:
        numbers.append(max(record.trials))
        axes.step(numbers, [*best, best[-1]], where="post", color=GREEN, linewidth=2, label="best so far", zorder=1)
    _ring(axes, record, lambda trial: trial.number)
    axes.set(xlabel="trial", ylabel=record.objective)
    _dress(figure, axes, f"{record.name}: objective by trial")
    return figure


def budget_picture(record: StudyRecord) -> Figure:
    """The best objective against the epochs that all trials together had cost by then."""
    figure = Figure(figsize=(7.2, 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    trials = sorted(record.trials.values(), key=lambda trial: trial.end_ms)
    epochs = np.cumsum([trial.num_epochs for trial in trials])
    ranked = {trial.number for trial in record.ranked()}
    done = [(int(cost), trial) for cost, trial in zip(epochs, trials, strict=True) if trial.number in ranked]
    costs = [cost for cost, _ in done]
    best = _best_so_far(record, [trial for _, trial in done])
    if best:
        axes.step([*costs, int(epochs[-1])], [*best, best[-1]], where="post", color=GREEN, linewidth=2)
    axes.set(xlabel="epochs trained by all trials together", ylabel=f"best {record.objective}", xlim=(0, None))
    _dress(figure, axes, f"{record.name}: what the budget bought")
    return figure


def time_picture(record: StudyRecord) -> Figure:
    """The objective against a trial's training time, for a study of one objective: time is none of its objectives."""
    figure = Figure(figsize=(7.2, 3.8), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    _scatter(axes, record, lambda trial: trial.seconds)
    _ring(axes, record, lambda trial: trial.seconds)
    axes.set(xlabel="training time, s", ylabel=record.objective)
    _dress(figure, axes, f"{record.name}: objective against training time")
    return figure


def pareto_picture(record: StudyRecord) -> Figure:
    """The first objective against each further one; ringed are the trials that no other one beats in all of them."""
    others = list(record.objectives)[1:]
    figure = Figure(figsize=(2.6 + 4.6 * len(others), 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(others), squeeze=False, sharey=True)[0]
    front = [trial for trial in record.ranked() if record.ranking and trial.number in record.ranking.front]
    for axes, name in zip(panels, others, strict=True):
        _scatter(axes, record, lambda trial, name=name: trial.last(name))  # type: ignore[misc]
        points = sorted((trial.last(name), record.value(trial), trial.number) for trial in front)
        x, y = [point[0] for point in points], [point[1] for point in points]
        joined = {"linestyle": "-" if len(others) == 1 else "none", "drawstyle": "steps-post"}
        axes.plot(
            x, y, color=GREEN, marker="o", markersize=10, fillstyle="none", label="Pareto front", zorder=1, **joined
        )
        axes.margins(0.12)  # room for the texts
        for cost, value, number in points:
            axes.annotate(f"trial {number}", (cost, value), xytext=(6, 6), textcoords="offset points", fontsize=8)
        axes.set_xlabel(f"{name} ({record.objectives[name]})")
        plain(axes)
    panels[0].set_ylabel(f"{record.objective} ({record.direction})")
    _legend(figure, panels[0])
    figure.suptitle(f"{record.name}: Pareto front of {', '.join(record.objectives)}", fontsize=12)
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
    """Each trial that can win as a line through its parameters, coloured by the objective."""
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
    figure.suptitle(f"{record.name}: parameters of the trials that can win", fontsize=12)
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
    looks: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for trial in record.trials.values():
        point = (x_of(trial), record.value(trial))
        if trial.state in LOOKS and all(map(math.isfinite, point)):
            looks.setdefault(_look(record, trial), []).append(point)
    order = [(*look, STATES[state]) for state, look in LOOKS.items()] + [REPETITION, BROKEN]
    for mark, colour, text in sorted(looks, key=order.index):
        x, y = zip(*looks[mark, colour, text], strict=True)
        axes.scatter(x, y, marker=mark, color=colour, s=28, label=text, zorder=2)


def _look(record: StudyRecord, trial: Trial) -> tuple[str, str, str]:
    """Mark, colour and text of a trial."""
    if record.ranking and trial.number in record.ranking.confirms:
        return REPETITION
    if record.ranking and trial.number in record.ranking.violated_constraints:
        return BROKEN
    return (*LOOKS[trial.state], STATES[trial.state])


def _ring(axes: Axes, record: StudyRecord, x_of: Callable[[Trial], float]) -> None:
    """Mark the best trial, with its mean over the seeds where there are several."""
    for trial in record.ranked()[:1]:
        seeds = record.seeds(trial)
        text = f"best: trial {trial.number}" + (f", mean of {len(seeds)} seeds" if len(seeds) > 1 else "")
        x, height = x_of(trial), statistics.fmean(seeds or [record.value(trial)])
        axes.plot([x], [height], "o", color=GREEN, markersize=11, fillstyle="none", label=text, zorder=3)


def _best_so_far(record: StudyRecord, trials: list[Trial]) -> list[float]:
    values = [record.sign * record.value(trial) for trial in trials]
    return [record.sign * value for value in np.maximum.accumulate(values)] if values else []


def _dress(figure: Figure, axes: Axes, title: str) -> None:
    plain(axes)
    _legend(figure, axes)
    figure.suptitle(title, fontsize=12)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, texts = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, texts, frameon=False, fontsize=9, ncols=3, loc="outside lower center")
