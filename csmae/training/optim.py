"""AdamW and its learning-rate schedule."""

import math

import torch
from torch import nn

from csmae.config import Optim


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW without weight decay on biases, norms and tokens (MAE, arXiv 2111.06377, appendix A.1)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def allocate_moments(optimizer: torch.optim.AdamW) -> None:
    """Allocate AdamW's state now if it has none yet.

    AdamW itself allocates it in its first step, parameter by parameter. If memory ran out there, a parameter would
    have half a state, and the step could not be repeated.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    # On the parameter's device because the optimizer is fused.
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def learning_rate(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up from 0, then a cosine to 0.

    Args:
        step: 0-based step of the whole training.
        num_steps: Steps of the whole training.
        warmup_steps: Steps of the warm-up, fewer than ``num_steps``.
        peak: Learning rate at the end of the warm-up.

    Returns:
        The learning rate of this step, > 0: the zeros lie one step before the first and one after the last.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
