"""Rank, collectives and device of this process; they also work without a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(tensor: Tensor) -> Tensor:
    """Stack the tensors of all ranks: (ranks, …). Collective."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return bool(all_gather(torch.tensor(flag, dtype=torch.uint8, device=device)).any())


def default_device() -> torch.device:
    """The GPU that the launcher gave this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
