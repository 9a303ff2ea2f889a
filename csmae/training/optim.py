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


def set_options(optimizer: torch.optim.AdamW, optim: Optim) -> None:
    """Set weight decay and betas of an optimizer that ``make_optimizer`` made; the learning rate is set at every step."""
    decayed, others = optimizer.param_groups
    decayed["weight_decay"] = optim.weight_decay
    for group in (decayed, others):
        group["betas"] = optim.betas


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


def learning_rate(step: int, steps_per_epoch: int, optim: Optim, num_epochs: int) -> float:
    """Linear warm-up from 0, a constant part with ``optim.schedule`` constant, then a decay to 0.

    Args:
        step: 0-based step of the whole training.
        steps_per_epoch: Steps of one epoch.
        optim: Peak, warm-up and shape of the decay.
        num_epochs: Epochs of the whole training.

    Returns:
        The learning rate of this step, > 0: the zeros lie one step before the first and one after the last.

    Source: constant with a decay of 1 - sqrt: arXiv 2405.18392, section 3.
    """
    warmup, num_steps = optim.warmup_epochs * steps_per_epoch, num_epochs * steps_per_epoch
    decay = optim.epochs_before_decay(num_epochs) * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if step < decay:
        return optim.lr
    progress = (step - decay) / (num_steps - decay)
    return optim.lr * (
        0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - math.sqrt(progress)
    )


def describe_growth(before: int, optim: Optim, num_epochs: int, trained: int) -> str:
    """Describe how trainings continue after ``train.epochs`` has grown, in one line.

    Args:
        before: Epochs of the whole training before.
        optim: Schedule of the learning rate.
        num_epochs: Epochs of the whole training now.
        trained: Epochs that are trained.
    """
    grows = f"train.epochs grows from {before} to {num_epochs}"
    if trained <= optim.epochs_before_decay(before):
        return f"{grows}: what is trained is the same as in a training that had {num_epochs} epochs from the start"
    reason = (
        "constant makes it so until the cooldown" if optim.schedule == "cosine" else "constant: the cooldown had begun"
    )
    return (
        f"{grows}: the learning rate of the remaining epochs follows the longer schedule, so a training that continues is not "
        f"identical to one that had {num_epochs} epochs from the start (optim.schedule {reason})"
    )
