"""Sensor-agnostic image retrieval: embed a split, rank an archive, score what was found.

Q queries, N archive scenes, D width, K retrieved scenes, C classes. A direction such as ``s1_to_s2`` queries with S1
features and ranks S2 features.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from csmae.data.archive import Split
from csmae.data.loader import batches, sequential_rows
from csmae.data.pairs import PairBatch
from csmae.encoders import SensorEncoder
from csmae.out_of_memory import halved_until_it_fits


@torch.no_grad()
def embed(
    encoder: SensorEncoder, split: Split, batch_size: int, advance: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """Features of the sensors of every scene of a split, computed without masking.

    Collective: the ranks of ``torch.distributed`` share the work and all get the whole.

    Args:
        encoder: On the device that shall compute.
        split: Scenes to embed, N of them.
        batch_size: Pairs a batch; out of memory, half as many pass through the encoder at a time, down to one.
        advance: Told of each batch's number of scenes.

    Returns:
        By sensor of the split, L2-normalised float32 features (N, D) in its order, on the encoder's device; zero for pairs
        that are damaged and were skipped.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = sequential_rows(len(split), batch_size, rank, world_size)
    found = torch.zeros(len(split.sensors), len(split), encoder.width, device=encoder.device)
    for row, batch in zip(rows, batches(split, rows, encoder.device), strict=True):
        features, batch_size = halved_until_it_fits(partial(_embed, encoder, batch), batch_size, "embedding")
        found[:, torch.as_tensor(row, device=encoder.device)] = torch.stack([features[s] for s in split.sensors])
        if advance:
            advance(len(row))
    found[:, torch.as_tensor(split.damaged_rows(), device=encoder.device)] = 0
    if world_size > 1:
        dist.all_reduce(found)
    return dict(zip(split.sensors, F.normalize(found, dim=2), strict=True))


def _embed(encoder: SensorEncoder, batch: PairBatch, num_pairs: int) -> dict[str, Tensor]:
    """Features of a batch, so many pairs at a time."""
    total = max(len(tensor) for tensor in batch)
    parts = [encoder.embed(batch.some(slice(start, start + num_pairs))) for start in range(0, total, num_pairs)]
    return {sensor: torch.cat([part[sensor] for part in parts]) for sensor in parts[0]}
