"""Computes mean and standard deviation of each band of a split, in one pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from csmae.data.loader import batches, sequential_rows
from csmae.data.split import Split

_BATCH_SIZE = 64


def band_statistics(split: Split, progress: Callable[[int], object]) -> dict[str, list[float]]:
    """Compute the statistics that the configuration's ``data`` section takes.

    Args:
        split: Each pixel counts once, at native resolution; damaged pairs that were skipped do not count.
        progress: Called with the number of pairs after each batch.

    Returns:
        ``s1_mean``, ``s1_std``, ``s2_mean`` and ``s2_std``, for the sensors that the split reads.
    """
    moments: dict[str, Tensor] = {}
    rows = sequential_rows(len(split), _BATCH_SIZE)
    for chosen, batch in zip(rows, batches(split, rows), strict=True):
        intact = np.delete(np.arange(len(chosen)), split.take(chosen).damaged_rows())
        for name, images in batch._asdict().items():
            if len(images):
                # float64, because 10^10 squares are summed
                pixels = images[intact].double().transpose(0, 1).flatten(1)
                sums = torch.stack([torch.full((len(pixels),), pixels.shape[1]), pixels.sum(1), pixels.square().sum(1)])
                moments[name] = moments[name] + sums if name in moments else sums
        progress(max(len(images) for images in batch))
    statistics = {}
    for sensor in split.sensors:
        count, total, squares = torch.cat([sums for name, sums in moments.items() if name.startswith(sensor)], dim=1)
        mean = total / count
        statistics[f"{sensor}_mean"] = mean.tolist()
        statistics[f"{sensor}_std"] = (squares / count - mean.square()).clamp(min=0).sqrt().tolist()
    return statistics
