"""Figures of one trial: reconstructions, retrieval, losses, F1 by direction."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from csmae.reporting.colors import render, stretch_of
from csmae.retrieval.panel import Image, Retrieval
from csmae.sensors import DIRECTIONS

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GRAY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#8A8A8A",
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
"""Colors that color-blind readers can distinguish (Okabe and Ito)."""
DPI = 110

LOSSES = {
    "train/loss": "total",
    "train/umr_s1": "S1 from S1",
    "train/umr_s2": "S2 from S2",
    "train/cmr_s1_to_s2": "S2 from S1",
    "train/cmr_s2_to_s1": "S1 from S2",
    "train/mim": "mutual information",
    "train/mde": "modality discrepancy",
}
"""Titles of the loss and its terms."""

Curve = Mapping[int, float]
"""A value by epoch."""


class Reconstruction(NamedTuple):
    """One scene of one sensor and its reconstructions."""

    sensor: str
    """``s1`` or ``s2``."""
    original: Image
    """(C, H, W) in dB or reflectance times 10,000, like the two reconstructions."""
    visible_hw: NDArray[np.bool_]
    """Pixels that the encoder saw."""
    uni_modal: Image
    """From the same sensor's visible patches."""
    cross_modal: Image
    """From the other sensor's visible patches."""


def format_direction(direction: str) -> str:
    """Format a retrieval direction for readers: ``S1 → S2``."""
    return direction.upper().replace("_TO_", " → ")


def style_axes(axes: Axes) -> None:
    """Remove the frame's top and right, and add a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def reconstruction_figure(scenes: Sequence[Reconstruction], title: str) -> Figure:
    """Show one row per scene and sensor, in one stretch: original, masked, uni-modal, cross-modal."""
    headings = ("original", "what the encoder sees", "from the same sensor", "from the other sensor")
    figure = Figure(figsize=(8.4, 2.05 * len(scenes) + 0.7), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(scenes), len(headings), squeeze=False)
    for row, scene in zip(grid, scenes, strict=True):
        stretch = stretch_of(scene.original)
        images = (
            render(scene.original, stretch),
            render(scene.original, stretch, scene.visible_hw),
            render(scene.uni_modal, stretch),
            render(scene.cross_modal, stretch),
        )
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel({"s1": "S1 (VV, VH, VV−VH)", "s2": "S2 natural color"}[scene.sensor], fontsize=9)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=12)
    return figure


def retrieval_figure(panels: Sequence[Retrieval], title: str) -> Figure:
    """Show one row per direction: the query, then its hits, framed green if they share a label with it, otherwise red."""
    count = max(len(panel.hits) for panel in panels)
    figure = Figure(figsize=(1.12 * (count + 1) + 0.8, 1.5 * len(panels) + 0.9), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(panels), count + 1, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes in row:
            axes.set(xticks=[], yticks=[])
        row[0].imshow(render(panel.query))
        row[0].set_ylabel(format_direction(panel.direction), fontsize=11)
        row[0].set_title("query", fontsize=9)
        for rank, (axes, hit) in enumerate(zip(row[1:], panel.hits, strict=False), start=1):
            axes.imshow(render(hit))
            mark, color = _hit_style(panel.shared[rank - 1] if panel.shared else None)
            axes.set_title(f"{rank} {mark}", fontsize=9, color=color)
            for spine in axes.spines.values():
                spine.set(color=color, linewidth=3)
        for axes in row[1 + len(panel.hits) :]:
            axes.set_axis_off()
    labels = "; ".join(panels[0].labels) or "its classes are not known"
    width = int(11 * figure.get_figwidth())
    lines = [*textwrap.wrap(title, width), *textwrap.wrap(f"query: {labels}", width)]
    figure.suptitle("\n".join(lines), fontsize=11)
    return figure


def _hit_style(shared: bool | None) -> tuple[str, str]:
    """Mark and color of a hit."""
    return {True: ("✓", GREEN), False: ("✗", RED), None: ("", GRAY)}[shared]


def loss_figure(curves: Mapping[str, Curve], title: str) -> Figure:
    """Plot the loss and its terms by epoch, in one panel each because their scales differ.

    Args:
        curves: By metric, such as ``train/loss`` and ``train/umr_s1``.
        title: Heading.
    """
    names = [name for name in LOSSES if curves.get(name)]
    columns = min(len(names), 4) or 1
    rows = -(-len(names) // columns) or 1
    figure = Figure(figsize=(2.7 * columns, 2.2 * rows + 0.5), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        _plot_curve(axes, curves[name], BLUE if name == "train/loss" else GRAY)
        axes.set_title(f"{LOSSES[name]}  ({name.removeprefix('train/')})", fontsize=9)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("epoch", fontsize=9)
    return figure


def direction_figure(curves: Mapping[str, Curve], title: str) -> Figure:
    """Plot F1 by epoch in the four directions and their mean.

    Args:
        curves: By metric: ``val/f1/s1_to_s1`` and so on, and ``val/f1_mean``.
        title: Heading.
    """
    figure = Figure(figsize=(6.4, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    labels = {f"val/f1/{direction}": format_direction(direction) for direction in DIRECTIONS} | {"val/f1_mean": "mean"}
    for (name, label), color in zip(labels.items(), (*PALETTE[: len(DIRECTIONS)], "black"), strict=True):
        if curves.get(name):
            _plot_curve(axes, curves[name], color, label)
    axes.set(xlabel="epoch", ylabel="F1 at k")
    if axes.lines:
        axes.legend(
            frameon=False, fontsize=9, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0
        )
    figure.suptitle(title, fontsize=12)
    return figure


def _plot_curve(axes: Axes, curve: Curve, color: str, label: str | None = None) -> None:
    epochs = sorted(curve)
    marker = "o" if len(epochs) < 25 else None
    axes.plot(epochs, [curve[epoch] for epoch in epochs], color=color, label=label, marker=marker, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    style_axes(axes)


def save_png(figure: Figure, path: Path) -> Path:
    """Write a figure to a file, and create its folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path
