"""The four losses of CSMAE, each a function of tensors, computed in float32.

B batch, L patches, M patches in the loss, P values of a patch, D width; 2 sensors.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from csmae.distributed import rank_and_world_size

EPSILON = 1e-6
"""Added to a patch's variance before its square root is taken."""


def normalize_patches(patches_blp: Tensor) -> Tensor:
    """Standardize each patch by its mean and unbiased variance (MAE, arXiv 2111.06377, section 3)."""
    variance, mean = torch.var_mean(patches_blp, dim=-1, keepdim=True)
    return (patches_blp - mean) / (variance + EPSILON).sqrt()


def reconstruction_loss(predicted_bmp: Tensor, target_bmp: Tensor) -> Tensor:
    """Mean squared error over the selected patches (UMR and CMR; arXiv 2401.07782, section III).

    Args:
        predicted_bmp: Predicted values of the patches in the loss.
        target_bmp: Their true values, normalized if ``loss.norm_pix`` is on.
    """
    return F.mse_loss(predicted_bmp.float(), target_bmp.float())


def nt_xent(z1_bd: Tensor, z2_bd: Tensor, temperature: float) -> Tensor:
    """Contrast the two sensors' views of each scene (the MIM loss).

    Args:
        z1_bd, z2_bd: Pooled features, one row per scene; need not be normalized.
        temperature: Softmax temperature, > 0.

    Returns:
        Scalar: the mean over this rank's 2B anchors, each against the features of all ranks. The mean over the ranks
        equals the loss of the global batch, in value and in gradient.

    Source: SimCLR (arXiv 2002.05709), eq. 1; CSMAE (arXiv 2401.07782).
    """
    rank, world_size = rank_and_world_size()
    with torch.autocast(z1_bd.device.type, enabled=False):  # 16-bit logits lose their digits at low temperatures
        local_2bd = torch.stack([F.normalize(z1_bd.float(), dim=1), F.normalize(z2_bd.float(), dim=1)])
        all_2bd = _AllGather.apply(local_2bd) if world_size > 1 else local_2bd
        logits = local_2bd.flatten(0, 1) @ all_2bd.flatten(0, 1).T / temperature
    scenes = torch.arange(len(z1_bd), device=z1_bd.device) + rank * len(z1_bd)
    anchors = torch.cat([scenes, scenes + all_2bd.shape[1]])
    logits = logits.scatter(1, anchors[:, None], float("-inf"))
    return F.cross_entropy(logits, anchors.roll(len(scenes)))


def modality_discrepancy(z1_bd: Tensor, z2_bd: Tensor) -> Tensor:
    """Pull the features of a pair together (the MDE loss): −mean(log(1 + exp(cos))), arXiv 2401.07782."""
    return -F.softplus(F.cosine_similarity(z1_bd.float(), z2_bd.float())).mean()


class _AllGather(torch.autograd.Function):
    """Concatenate the scenes of all ranks along dimension 1.

    The backward pass sums the gradients that all ranks compute for a scene.
    """

    @staticmethod
    def forward(ctx: Any, local_2bd: Tensor) -> Tensor:
        parts = [torch.empty_like(local_2bd) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local_2bd.contiguous())
        ctx.batch = local_2bd.shape[1]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.narrow(1, dist.get_rank() * ctx.batch, ctx.batch)
