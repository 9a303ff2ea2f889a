"""Plots of one trial, from the files that its training wrote.

``metrics.jsonl`` holds the metrics of every epoch (see ``csmae.training.history``). A file ``arrays/epoch-0009.npz`` holds, for
a few scenes B, in dB and in reflectance times 10,000: ``s1`` and ``s2`` (B, C, H, W); ``s1_visible`` and ``s2_visible``
(B, H, W), True where the encoder saw the pixel; ``s1_to_s1``, ``s1_to_s2``, ``s2_to_s1`` and ``s2_to_s2`` (B, C, H, W), the
second sensor reconstructed from the first, for the sensors that the losses reconstruct, NaN in patches without a loss. S2 may
have the bands of natural color only. The file may also hold a query and its hits: ``query_s1`` and ``query_s2`` (C, H, W),
``labels`` (the query's names), and for each direction ``hits_s1_to_s2`` (k, C, H, W) and ``shared_s1_to_s2`` (k), True where
a label is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from csmae.reporting.plots import (
    Reconstruction,
    direction_figure,
    loss_figure,
    reconstruction_figure,
    retrieval_figure,
    save_png,
)
from csmae.retrieval.panel import Retrieval
from csmae.sensors import DIRECTIONS, SENSORS
from csmae.training.history import read_curves

NUM_SCENES = 3
"""Scenes shown per file; more would be too small to see."""


def save_trial_plots(number: int, run_dir: Path) -> Path:
    """Plot the curves of a trial, and its arrays of the first, middle and last epoch.

    Args:
        number: The trial.
        run_dir: Its folder.

    Returns:
        The folder of the plots.
    """
    plots, curves, trial = run_dir / "plots", read_curves(run_dir), f"trial {number}"
    if curves:  # they are not on this machine if the storage is a bucket from which they were removed
        save_png(loss_figure(curves, f"Losses of {trial}"), plots / "losses.png")
        save_png(direction_figure(curves, f"F1 of {trial}"), plots / "f1.png")
    for path in _first_middle_last(sorted((run_dir / "arrays").glob("epoch-*.npz"))):
        with np.load(path, allow_pickle=False) as arrays:
            for kind, figure in _figures(arrays, f"{trial}, epoch {int(path.stem[6:])}"):
                save_png(figure, plots / f"{path.stem}-{kind}.png")
    return plots


def _first_middle_last(paths: list[Path]) -> list[Path]:
    return [paths[index] for index in sorted({0, len(paths) // 2, len(paths) - 1})] if paths else []


def _figures(arrays: Mapping[str, Any], title: str) -> Iterator[tuple[str, Figure]]:
    reconstructed = [sensor for sensor in SENSORS if f"s1_to_{sensor}" in arrays]
    indices = range(len(arrays["s1"][:NUM_SCENES]))
    if scenes := [_reconstruction(arrays, sensor, index) for index in indices for sensor in reconstructed]:
        yield "reconstructions", reconstruction_figure(scenes, title)
    if "labels" in arrays:
        yield "retrieval", retrieval_figure([_retrieval(arrays, direction) for direction in DIRECTIONS], title)


def _reconstruction(arrays: Mapping[str, Any], sensor: str, index: int) -> Reconstruction:
    other = "s2" if sensor == "s1" else "s1"
    names = (sensor, f"{sensor}_visible", f"{sensor}_to_{sensor}", f"{other}_to_{sensor}")
    return Reconstruction(sensor, *(_single_precision(arrays[name][index]) for name in names))


def _retrieval(arrays: Mapping[str, Any], direction: str) -> Retrieval:
    return Retrieval(
        direction,
        query=_single_precision(arrays[f"query_{direction[:2]}"]),
        hits=list(_single_precision(arrays[f"hits_{direction}"])),
        shared=[bool(flag) for flag in arrays[f"shared_{direction}"]],
        labels=[str(label) for label in arrays["labels"]],
    )


def _single_precision(array: Any) -> Any:
    """Images in single precision; masks do not change."""
    return array.astype(np.float32) if array.dtype == np.float16 else array
