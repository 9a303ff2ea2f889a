"""Pictures of one trial: reconstructions, retrieval, losses, F1 by direction. Arrays in, figures out."""

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

from csmae.reporting.colors import paint, stretch_of
from csmae.retrieval.panel import Image, Retrieval
from csmae.sensors import DIRECTIONS

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#8A8A8A",
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
"""Colours that the colour-blind can tell apart (Okabe and Ito)."""
DPI = 110

Curve = Mapping[int, float]
"""A value by epoch."""


class Reconstruction(NamedTuple):
    """One scene of one sensor, and what the network made of it."""

    sensor: str
    """``s1`` or ``s2``."""
    original: Image
    """(C, H, W) in dB or reflectance times 10,000, as are the two below."""
    visible_hw: NDArray[np.bool_]
    """Pixels that the encoder saw."""
    uni_modal: Image
    """From the same sensor's visible patches."""
    cross_modal: Image
    """From the other sensor's visible patches."""


def readable(direction: str) -> str:
    """A direction as people write it."""
    return direction.upper().replace("_TO_", " → ")


def plain(axes: Axes) -> None:
    """Leave away what says nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def reconstruction_picture(scenes: Sequence[Reconstruction], title: str) -> Figure:
    """One row a scene and sensor: original, masked, uni-modal, cross-modal; one stretch a row."""
    headings = ("original", "what the encoder sees", "from the same sensor", "from the other sensor")
    figure = Figure(figsize=(8.4, 2.05 * len(scenes) + 0.7), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(scenes), len(headings), squeeze=False)
    for row, scene in zip(grid, scenes, strict=True):
        stretch = stretch_of(scene.original)
        pictures = (
            paint(scene.original, stretch),
            paint(scene.original, stretch, scene.visible_hw),
            paint(scene.uni_modal, stretch),
            paint(scene.cross_modal, stretch),
        )
        for axes, picture in zip(row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel({"s1": "S1 (VV, VH, VV−VH)", "s2": "S2 natural colour"}[scene.sensor], fontsize=9)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=12)
    return figure


def retrieval_picture(panels: Sequence[Retrieval], title: str) -> Figure:
    """One row a direction: the query, then its hits; a green frame where they share a label, a red one elsewhere."""
    count = max(len(panel.hits) for panel in panels)
    figure = Figure(figsize=(1.12 * (count + 1) + 0.8, 1.5 * len(panels) + 0.9), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(panels), count + 1, squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes in row:
            axes.set(xticks=[], yticks=[])
        row[0].imshow(paint(panel.query))
        row[0].set_ylabel(readable(panel.direction), fontsize=11)
        row[0].set_title("query", fontsize=9)
        for rank, (axes, hit) in enumerate(zip(row[1:], panel.hits, strict=False), start=1):
            axes.imshow(paint(hit))
            mark, colour = _judge(panel.shared[rank - 1] if panel.shared else None)
            axes.set_title(f"{rank} {mark}", fontsize=9, color=colour)
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=3)
        for axes in row[1 + len(panel.hits) :]:
            axes.set_axis_off()
    labels = "; ".join(panels[0].labels) or "its classes are not known"
    width = int(11 * figure.get_figwidth())
    lines = [*textwrap.wrap(title, width), *textwrap.wrap(f"query: {labels}", width)]
    figure.suptitle("\n".join(lines), fontsize=11)
    return figure


def _judge(shared: bool | None) -> tuple[str, str]:
    """Mark and colour of a hit."""
    return {True: ("✓", GREEN), False: ("✗", RED), None: ("", GREY)}[shared]


def loss_picture(curves: Mapping[str, Curve], title: str) -> Figure:
    """The loss and its terms by epoch, one panel each, for their sizes differ.

    Args:
        curves: By metric, such as ``train/loss`` and ``train/umr_s1``.
        title: Heading.
    """
    names = {
        "train/loss": "total",
        "train/umr_s1": "S1 from S1",
        "train/umr_s2": "S2 from S2",
        "train/cmr_s1_to_s2": "S2 from S1",
        "train/cmr_s2_to_s1": "S1 from S2",
        "train/mim": "mutual information",
        "train/mde": "modality discrepancy",
    }
    shown = [name for name in names if curves.get(name)]
    columns = min(len(shown), 4) or 1
    rows = -(-len(shown) // columns) or 1
    figure = Figure(figsize=(2.7 * columns, 2.2 * rows + 0.5), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(grid, shown, strict=False):
        _draw(axes, curves[name], BLUE if name == "train/loss" else GREY)
        axes.set_title(f"{names[name]}  ({name.removeprefix('train/')})", fontsize=9)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("epoch", fontsize=9)
    return figure


def direction_picture(curves: Mapping[str, Curve], title: str) -> Figure:
    """F1 by epoch in the four directions and on average; each line bears its name.

    Args:
        curves: By metric; read are ``val/f1/s1_to_s1`` and so on, and ``val/f1_mean``.
        title: Heading.
    """
    figure = Figure(figsize=(6.4, 3.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    lines = {f"val/f1/{direction}": readable(direction) for direction in DIRECTIONS} | {"val/f1_mean": "mean"}
    for (name, label), colour in zip(lines.items(), (*PALETTE[:4], "black"), strict=True):
        if curves.get(name):
            _draw(axes, curves[name], colour, label)
    axes.set(xlabel="epoch", ylabel="F1 at k")
    if axes.lines:
        axes.legend(
            frameon=False, fontsize=9, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0
        )
    figure.suptitle(title, fontsize=12)
    return figure


def _draw(axes: Axes, curve: Curve, colour: str, label: str | None = None) -> None:
    epochs = sorted(curve)
    mark = "o" if len(epochs) < 25 else None
    axes.plot(epochs, [curve[epoch] for epoch in epochs], color=colour, label=label, marker=mark, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    plain(axes)


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure's file; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    return path
