"""Which patches of each sensor the encoder sees.

B batch, L patches, K kept patches, M = L − K removed patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from csmae.config import Masking


class Mask(NamedTuple):
    """The patches of one sensor, parted in two."""

    keep_bk: Tensor
    """Indices of the visible patches."""
    removed_bm: Tensor
    """Indices of the hidden patches."""

    @property
    def restore_bl(self) -> Tensor:
        """Where each patch stands in the row of visible, then hidden ones."""
        return torch.cat([self.keep_bk, self.removed_bm], dim=1).argsort(dim=1)

    @property
    def removed_bl(self) -> Tensor:
        """1 where a patch is hidden, 0 where it is visible, float32."""
        num_patches = self.keep_bk.shape[1] + self.removed_bm.shape[1]
        ones = torch.ones(len(self.keep_bk), num_patches, device=self.keep_bk.device)
        return ones.scatter(1, self.keep_bk, 0.0)


def draw_masks(noise_s1_bl: Tensor, noise_s2_bl: Tensor, masking: Masking) -> dict[str, Mask]:
    """Part the patches of both sensors.

    Args:
        noise_s1_bl: Uniform noise in [0, 1); the smallest are kept.
        noise_s2_bl: The same for S2; read by ``random`` only.
        masking: Ratio of hidden patches and the correspondence between the sensors.

    Returns:
        The masks under ``s1`` and ``s2``. With ``disjoint`` every patch is visible in exactly one of the sensors.

    Source: CSMAE (arXiv 2401.07782), section III; MAE (arXiv 2111.06377) for the sampling.
    """
    s1 = _part(noise_s1_bl, masking.ratio)
    if masking.strategy == "identical":
        return {"s1": s1, "s2": s1}
    if masking.strategy == "disjoint":
        return {"s1": s1, "s2": Mask(s1.removed_bm, s1.keep_bk)}
    return {"s1": s1, "s2": _part(noise_s2_bl, masking.ratio)}


def _part(noise_bl: Tensor, ratio: float) -> Mask:
    order_bl = noise_bl.argsort(dim=1, stable=True)
    kept = int(noise_bl.shape[1] * (1 - ratio))
    return Mask(order_bl[:, :kept], order_bl[:, kept:])
