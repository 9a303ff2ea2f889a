"""Random masking: which patches of each sensor the encoder sees.

B batch, L patches, K kept patches, M = L − K removed patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from csmae.config import Masking


class Mask(NamedTuple):
    """The visible and the removed patches of one sensor."""

    ids_keep_bk: Tensor
    """Indices of the visible patches."""
    ids_removed_bm: Tensor
    """Indices of the removed patches."""

    @property
    def ids_restore_bl(self) -> Tensor:
        """Position of each patch in the sequence of the visible patches followed by the removed ones."""
        return torch.cat([self.ids_keep_bk, self.ids_removed_bm], dim=1).argsort(dim=1)

    @property
    def mask_bl(self) -> Tensor:
        """1 where a patch is removed, 0 where it is visible, float32."""
        num_patches = self.ids_keep_bk.shape[1] + self.ids_removed_bm.shape[1]
        ones = torch.ones(len(self.ids_keep_bk), num_patches, device=self.ids_keep_bk.device)
        return ones.scatter(1, self.ids_keep_bk, 0.0)


def draw_masks(noise_s1_bl: Tensor, noise_s2_bl: Tensor, masking: Masking) -> dict[str, Mask]:
    """Choose the visible patches of both sensors.

    Args:
        noise_s1_bl: Uniform noise in [0, 1); the patches with the smallest values are kept.
        noise_s2_bl: The same for S2; only the strategy ``random`` reads it.
        masking: Ratio of removed patches and correspondence between the sensors.

    Returns:
        The masks under ``s1`` and ``s2``. With ``disjoint`` every patch is visible in exactly one sensor.

    Source: CSMAE (arXiv 2401.07782), section III; MAE (arXiv 2111.06377) for the sampling.
    """
    s1 = _random_mask(noise_s1_bl, masking.ratio)
    if masking.strategy == "identical":
        return {"s1": s1, "s2": s1}
    if masking.strategy == "disjoint":
        return {"s1": s1, "s2": Mask(s1.ids_removed_bm, s1.ids_keep_bk)}
    return {"s1": s1, "s2": _random_mask(noise_s2_bl, masking.ratio)}


def loss_reads_removed(masking: Masking, source: str, target: str) -> bool:
    """Whether a reconstruction loss reads the patches removed in the source, rather than those visible in it."""
    return source == target or masking.reconstruction == "disjoint"


def _random_mask(noise_bl: Tensor, ratio: float) -> Mask:
    ids_shuffle_bl = noise_bl.argsort(dim=1, stable=True)
    num_kept = int(noise_bl.shape[1] * (1 - ratio))
    return Mask(ids_shuffle_bl[:, :num_kept], ids_shuffle_bl[:, num_kept:])
