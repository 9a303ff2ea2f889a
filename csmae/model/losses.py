"""The four losses of CSMAE, each a function of tensors, all in float32.

B batch, L patches, P values of a patch, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

EPSILON = 1e-6
"""Added to a patch's variance before dividing by its root."""


def normalise_patches(patches_blp: Tensor) -> Tensor:
    """Each patch minus its mean, over the root of its unbiased variance (MAE, arXiv 2111.06377, section 3)."""
    variance, mean = torch.var_mean(patches_blp, dim=-1, keepdim=True)
    return (patches_blp - mean) / (variance + EPSILON).sqrt()


def reconstruction_loss(predicted_bmp: Tensor, target_bmp: Tensor) -> Tensor:
    """Mean squared error over the selected patches (UMR and CMR; arXiv 2401.07782, section III).

    Args:
        predicted_bmp: Predicted values of the patches in the loss.
        target_bmp: Their true values, normalised where ``loss.norm_pix`` is on.
    """
    return F.mse_loss(predicted_bmp.float(), target_bmp.float())


def nt_xent(z1_bd: Tensor, z2_bd: Tensor, temperature: float) -> Tensor:
    """Contrast the two sensors' views of each scene (the MIM loss).

    Args:
        z1_bd, z2_bd: Pooled features, one row a scene; need not be normalised.
        temperature: Softmax temperature, > 0.

    Returns:
        Scalar: the mean over this rank's 2B anchors, each against the features of all ranks; the mean over the ranks
        is the loss of the whole batch, in value and in gradient.

    Source: SimCLR (arXiv 2002.05709), eq. 1; CSMAE (arXiv 2401.07782).
    """
    with torch.autocast(z1_bd.device.type, enabled=False):  # in 16 bit a low temperature's logits lose their digits
        local = torch.stack([F.normalize(z1_bd.float(), dim=1), F.normalize(z2_bd.float(), dim=1)])
        everyone = _gather_scenes(local)
        logits = local.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature
    rank, scenes = _rank(), everyone.shape[1]
    own = torch.arange(len(z1_bd), device=z1_bd.device) + rank * len(z1_bd)
    anchors = torch.cat([own, own + scenes])
    logits = logits.scatter(1, anchors[:, None], float("-inf"))
    return F.cross_entropy(logits, anchors.roll(len(own)))


def modality_discrepancy(z1_bd: Tensor, z2_bd: Tensor) -> Tensor:
    """Pull the features of a pair together (the MDE loss): −mean(log(1 + exp(cos))), arXiv 2401.07782."""
    return -F.softplus(F.cosine_similarity(z1_bd.float(), z2_bd.float())).mean()


class _Gather(torch.autograd.Function):
    """Concatenate every rank's rows; the gradient of a row is the sum of what all ranks ask of it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.width = local.shape[1]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.narrow(1, _rank() * ctx.width, ctx.width)


def _gather_scenes(local_vbd: Tensor) -> Tensor:
    """Features of the scenes of all ranks along dimension 1, with gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local_vbd
    gathered: Tensor = _Gather.apply(local_vbd)
    return gathered


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
