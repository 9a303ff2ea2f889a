"""Sums of the loss terms over the steps of an epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from csmae.distributed import all_gather, rank_and_world_size


class TermSums:
    """Sums on this rank, kept on the device, so that a step does not wait for it.

    Args:
        saved: Sums of an interrupted epoch by term, (ranks,) each; see ``gather``.
        device: Of the loss.
    """

    def __init__(self, saved: Mapping[str, Tensor], device: torch.device) -> None:
        self._rank, self._world_size = rank_and_world_size()
        self._device = device
        self._sums = {name: self._local(rank_sums) for name, rank_sums in saved.items()}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add a step's terms."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + term

    def means(self, num_steps: int) -> dict[str, float]:
        """Compute the means over steps and ranks. Collective; waits for the device."""
        stacked = torch.stack(list(self._sums.values())) / num_steps / self._world_size
        if self._world_size > 1:
            dist.all_reduce(stacked)
        return dict(zip(self._sums, stacked.tolist(), strict=True))

    def gather(self) -> dict[str, Tensor]:
        """Return the sums of all ranks by term, (ranks,) each, for a checkpoint. Collective."""
        rank_sums = all_gather(torch.stack(list(self._sums.values()))).cpu().unbind(1)
        return dict(zip(self._sums, rank_sums, strict=True))

    def _local(self, rank_sums: Tensor) -> Tensor:
        """This rank's part of the sums (ranks,) in a checkpoint; if the number of ranks has changed, rank 0 takes all."""
        if len(rank_sums) == self._world_size:
            return rank_sums[self._rank].to(self._device)
        return (rank_sums.sum() * (self._rank == 0) * self._world_size / len(rank_sums)).to(self._device)
