"""Features of a split, computed by all ranks together.

N scenes, D width, S sensors.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from csmae.data.loader import batches, sequential_rows
from csmae.data.pairs import PairBatch
from csmae.data.split import Split
from csmae.distributed import rank_and_world_size
from csmae.encoders import SensorEncoder
from csmae.out_of_memory import retry_with_half

BATCH_SIZE = 256
"""Pairs per batch where no configuration gives another number."""


@torch.no_grad()
def embed(
    encoder: SensorEncoder, split: Split, batch_size: int = BATCH_SIZE, advance: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """Compute unmasked features of all scenes of a split.

    Collective: the ranks of ``torch.distributed`` share the scenes, and all get all features.

    Args:
        encoder: On the device that computes.
        split: N scenes.
        batch_size: Pairs per batch; when memory runs out, the encoder gets half as many at a time, down to one.
        advance: Called with the number of scenes of each finished batch.

    Returns:
        By sensor of the split, L2-normalized float32 features (N, D) in its order, on the encoder's device; zero for
        damaged pairs, if the split skips them.
    """
    rank, world_size = rank_and_world_size()
    rows = sequential_rows(len(split), batch_size, rank, world_size)
    features_snd = torch.zeros(len(split.sensors), len(split), encoder.width, device=encoder.device)
    for row, batch in zip(rows, batches(split, rows, encoder.device), strict=True):
        features, batch_size = retry_with_half(partial(_embed_batch, encoder, batch), batch_size, "embedding")
        features_snd[:, torch.as_tensor(row, device=encoder.device)] = torch.stack([features[s] for s in split.sensors])
        if advance:
            advance(len(row))
    features_snd[:, torch.as_tensor(split.damaged_rows(), device=encoder.device)] = 0
    if world_size > 1:
        dist.all_reduce(features_snd)
    return dict(zip(split.sensors, F.normalize(features_snd, dim=2), strict=True))


def _embed_batch(encoder: SensorEncoder, batch: PairBatch, num_pairs: int) -> dict[str, Tensor]:
    """Features of a batch, computed for ``num_pairs`` pairs at a time."""
    total = max(len(tensor) for tensor in batch)
    parts = [encoder.embed(batch.select(slice(start, start + num_pairs))) for start in range(0, total, num_pairs)]
    return {sensor: torch.cat([part[sensor] for part in parts]) for sensor in parts[0]}
