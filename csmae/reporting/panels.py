"""From the arrays that a training run leaves to the pictures of its trial.

A file ``trials/N/arrays/epoch-0009.npz`` holds, for a few scenes B, in dB and in reflectance times 10,000:
``s1`` and ``s2`` (B, C, H, W); ``s1_visible`` and ``s2_visible`` (B, H, W), True where the encoder saw the pixel;
``s1_to_s1``, ``s1_to_s2``, ``s2_to_s1`` and ``s2_to_s2`` (B, C, H, W), the second sensor reconstructed from the first, of
those sensors that the losses reconstruct, NaN in patches that no loss asks for. Of S2 the bands of natural colour are enough.
It may hold a query and its hits too: ``query_s1`` and ``query_s2`` (C, H, W), ``labels`` (the query's names), and for
each direction ``hits_s1_to_s2`` (k, C, H, W) and ``shared_s1_to_s2`` (k), True where a label is in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from csmae.reporting.plots import (
    Reconstruction,
    direction_picture,
    loss_picture,
    reconstruction_picture,
    retrieval_picture,
    save_png,
)
from csmae.reporting.record import Trial
from csmae.retrieval.panel import Retrieval
from csmae.sensors import DIRECTIONS, SENSORS

NUM_SCENES = 3
"""Shown of a file; more would be too small to see."""


def draw_trial(trial: Trial, folder: Path) -> Path:
    """Draw what there is of a trial.

    Args:
        trial: Its curves.
        folder: Its own, which may hold ``arrays/*.npz``.

    Returns:
        The folder of the pictures.
    """
    pictures, name = folder / "pictures", f"trial {trial.number}"
    save_png(loss_picture(trial.curves, f"Losses of {name}"), pictures / "losses.png")
    save_png(direction_picture(trial.curves, f"F1 of {name}"), pictures / "f1.png")
    for path in _start_middle_end(sorted((folder / "arrays").glob("epoch-*.npz"))):
        with np.load(path, allow_pickle=False) as arrays:
            for kind, figure in _figures(arrays, f"{name}, epoch {int(path.stem[6:])}"):
                save_png(figure, pictures / f"{path.stem}-{kind}.png")
    return pictures


def _start_middle_end(paths: list[Path]) -> list[Path]:
    return [paths[place] for place in sorted({0, len(paths) // 2, len(paths) - 1})] if paths else []


def _figures(arrays: Mapping[str, Any], title: str) -> Iterator[tuple[str, Figure]]:
    made = [sensor for sensor in SENSORS if f"s1_to_{sensor}" in arrays]
    scenes = [_scene(arrays, sensor, place) for place in range(len(arrays["s1"][:NUM_SCENES])) for sensor in made]
    if scenes:
        yield "reconstructions", reconstruction_picture(scenes, title)
    if "labels" in arrays:
        yield "retrieval", retrieval_picture([_panel(arrays, direction) for direction in DIRECTIONS], title)


def _scene(arrays: Mapping[str, Any], sensor: str, place: int) -> Reconstruction:
    other = "s2" if sensor == "s1" else "s1"
    names = (sensor, f"{sensor}_visible", f"{sensor}_to_{sensor}", f"{other}_to_{sensor}")
    return Reconstruction(sensor, *(_float(arrays[name][place]) for name in names))


def _panel(arrays: Mapping[str, Any], direction: str) -> Retrieval:
    query, hits, shared = arrays[f"query_{direction[:2]}"], arrays[f"hits_{direction}"], arrays[f"shared_{direction}"]
    return Retrieval(
        direction,
        _float(query),
        list(_float(hits)),
        [bool(flag) for flag in shared],
        [str(x) for x in arrays["labels"]],
    )


def _float(array: Any) -> Any:
    """Images in single precision; masks as they are."""
    return array.astype(np.float32) if array.dtype == np.float16 else array
