"""The metrics of every epoch of a training, in its folder: one JSON object per line."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from csmae.atomic import atomic_write

log = logging.getLogger(__name__)

HISTORY = "metrics.jsonl"
"""File name in the folder of a training."""


def append_metrics(folder: Path, epoch: int, metrics: Mapping[str, float]) -> None:
    """Append the metrics of an epoch; the first epoch starts a new file. If the disk is full, only a warning is logged.

    An epoch that is trained again, after a resume from an earlier checkpoint, is appended again. The file is replaced as a
    whole, because a bucket gets its content from a hard link.
    """
    path = folder / HISTORY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if epoch > 1 and path.exists() else b""
        with atomic_write(path) as file:
            file.write(before + json.dumps({"epoch": epoch, **metrics}).encode() + b"\n")
    except OSError as error:
        log.warning("%s: cannot be written (%s): epoch %d is missing in the plots", path, error.strerror, epoch)


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Read each metric's values by epoch, the last one of an epoch that was trained twice.

    Returns:
        Empty if there is no file. A damaged line is skipped.
    """
    curves: dict[str, dict[int, float]] = {}
    path = folder / HISTORY
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            metrics = dict(json.loads(line))
            epoch = int(metrics.pop("epoch"))
        except (ValueError, TypeError, KeyError):
            continue
        for name, value in metrics.items():
            curves.setdefault(name, {})[epoch] = value
    return curves
