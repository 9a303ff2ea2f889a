"""One optimiser step on one rank: precision, micro-batches, and what happens when the memory is too small.

R pairs of this rank, L patches, D width.
"""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from csmae.config import Config, ConfigError
from csmae.model.blocks import Block
from csmae.model.csmae import CSMAE
from csmae.training.memory import MicroBatch
from csmae.training.optim import make_optimizer


class _Part(NamedTuple):
    """A micro-batch: the arguments of ``CSMAE.forward``."""

    s1: Tensor
    s2: Tensor
    noise_s1: Tensor
    noise_s2: Tensor


class Stepper:
    """The network with what trains it.

    Args:
        model: On its device.
        config: The whole run.
        run_dir: Keeps a micro-batch found too large, where given.

    Raises:
        ConfigError: ``train.compile`` without a C++ compiler, or not one pair fits into the memory.
    """

    def __init__(self, model: CSMAE, config: Config, run_dir: Path | None) -> None:
        self.model, self.device = model, model.encoder.norm.weight.device
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.memory = MicroBatch(config, world_size, run_dir)
        self.optimizer = make_optimizer(model, config.optim)
        self.precision = autocast_type(config.train.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.compiled = config.train.compile
        if self.compiled:
            compile_blocks(model)
        self.parallel: DistributedDataParallel | None = None
        if world_size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            with warnings.catch_warnings():
                # Its replacement, forward_sync_buffers, exists in torch 2.13 and newer only.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                # Buffers are constants: nothing to broadcast.
                self.parallel = DistributedDataParallel(
                    model, ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    def __call__(self, s1: Tensor, s2: Tensor, noise_2rl: Tensor) -> dict[str, Tensor]:
        """One optimiser step; returns the loss terms, detached.

        Out of memory, the step is repeated with half the micro-batch. With other ranks that is not possible here: they
        wait in a collective. The smaller size is left for the next attempt, and the error goes on.
        """
        whole = _Part(s1, s2, noise_2rl[0], noise_2rl[1])
        while True:
            try:
                terms = self._accumulate(whole)
                break
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                self.memory.halve()
                if self.parallel:
                    raise
                self.memory.check()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return terms

    def eager(self) -> AbstractContextManager[object]:
        """Within it nothing is compiled: a score's batches have shapes of their own."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _accumulate(self, whole: _Part) -> dict[str, Tensor]:
        """Gradients of this rank's share, one micro-batch after another; returns the mean loss terms."""
        parts = [_Part(*tensors) for tensors in zip(*(t.split(self.memory.micro_batch) for t in whole), strict=True)]
        pulls, sums = self._contrast(parts)
        for index, (part, pull) in enumerate(zip(parts, pulls, strict=True)):
            share = len(part.s1) / len(whole.s1)
            last = index + 1 == len(parts)
            with self.parallel.no_sync() if self.parallel and not last else nullcontext():
                with self._autocast():
                    terms = (self.parallel or self.model)(*part, None if pull is None else pull / share)
                self.scaler.scale(terms["loss"] * share).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term.detach() * share
        return sums

    def _contrast(self, parts: list[_Part]) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """The contrastive terms over all micro-batches of all ranks, where there are several micro-batches.

        The features of all come first, without what a backward pass needs; the terms' gradient with respect to them
        is then carried through each micro-batch (GradCache, arXiv 2101.06983). So NT-Xent contrasts the global batch,
        whatever the micro-batch, for one more pass through the encoder.

        Returns:
            Each part's gradient (2, pairs, D), or None where the part is all there is; and the terms.
        """
        if len(parts) == 1 or not self.model.loss.contrastive:
            return [None] * len(parts), {}
        with torch.no_grad(), self._autocast():
            features = torch.cat([self.model.features(*part) for part in parts], dim=1).float()
        features.requires_grad_()
        terms = self.model.contrast(features)
        (gradient,) = torch.autograd.grad(terms["loss"], features)
        pulls = gradient.split([len(part.s1) for part in parts], dim=1)
        return list(pulls), {name: term.detach() for name, term in terms.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)


def autocast_type(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products; losses stay in float32."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def compile_blocks(model: CSMAE) -> None:
    """Let ``torch.compile`` fuse each transformer block: blocks of one shape share their code.

    What earlier networks of this process left is forgotten first: a warm worker trains many, and torch would end up at
    its limit of recompilations, or with the code of all of them.

    Raises:
        ConfigError: This machine has no C++ compiler.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise ConfigError(
            "train.compile needs a C++ compiler, and this machine has none: install g++, or set it to false"
        )
    torch.compiler.reset()
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
