"""One optimiser step on one rank: precision, micro-batches, and what happens when the memory is too small.

R pairs of this rank, L patches, D width.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from csmae.out_of_memory import is_out_of_memory
from csmae.training.micro_batch import MicroBatch, SmallerMicroBatchError
from csmae.training.optim import allocate_moments, make_optimizer

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Shapes that torch compiles of one function, which all blocks of a network are: lengths of the sensors' tokens, tokens asked
for, passes with and without gradients. A training has up to about a dozen; torch's own limit is 8, and beyond it runs uncompiled."""

Images = Callable[[slice], tuple[Tensor, Tensor]]
"""Prepares the images (pairs, C, H, W) of both sensors for some of a rank's pairs of a step."""


class _Part(NamedTuple):
    """A micro-batch: the arguments of ``CSMAE.forward``."""

    s1: Tensor
    s2: Tensor
    noise_s1: Tensor
    noise_s2: Tensor


class Stepper:
    """The network with what trains it. Collective.

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
        self._agree(world_size)
        self.memory.check()
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

    def allocate(self) -> None:
        """Take the memory of AdamW's moments, so that a batch that is too large is all that can be too much."""
        allocate_moments(self.optimizer)

    def __call__(self, images: Images, noise_2rl: Tensor) -> dict[str, Tensor]:
        """One optimiser step; returns the loss terms, detached.

        Out of memory, the gradients are computed again with half the micro-batch. With other ranks that is not possible
        here, for they wait in a collective; nor once weights may have changed. Then the smaller size is left for the next
        attempt, which begins with the last checkpoint.

        Args:
            images: Called for each micro-batch, once or twice.
            noise_2rl: Uniform noise in [0, 1) that chooses both sensors' visible patches.

        Raises:
            SmallerMicroBatchError: The training must go on from its checkpoint. ``MemoryLimitError``: One pair is too much.
        """
        while True:
            try:
                terms = self._accumulate(images, noise_2rl)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve()
                if self.parallel:
                    raise SmallerMicroBatchError(self.memory.micro_batch) from error
            log.warning("out of memory: repeating the step with micro-batches of %d pairs", self.memory.micro_batch)
        try:
            self.scaler.step(self.optimizer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._halve()
            raise SmallerMicroBatchError(self.memory.micro_batch) from error
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return terms

    def eager(self) -> AbstractContextManager[object]:
        """Within it nothing is compiled: a score's batches have shapes of their own."""
        set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6; before, a score is compiled as well
        return set_stance("force_eager") if self.compiled and set_stance else nullcontext()

    def _halve(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.memory.halve()

    def _agree(self, world_size: int) -> None:
        """Take the smallest of the ranks' micro-batches: only equal ones meet in the same collectives.

        Ranks may see different notes where each has a copy of the run's folder.
        """
        if world_size > 1:
            least = torch.tensor(self.memory.micro_batch, device=self.device)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            self.memory.micro_batch = int(least)

    def _accumulate(self, images: Images, noise_2rl: Tensor) -> dict[str, Tensor]:
        """Gradients of this rank's share, one micro-batch after another; returns the mean loss terms."""
        num_pairs, size = noise_2rl.shape[1], self.memory.micro_batch
        rows = [slice(start, min(start + size, num_pairs)) for start in range(0, num_pairs, size)]

        def parts() -> Iterator[_Part]:
            for some in rows:
                s1, s2 = images(some)
                yield _Part(s1, s2, *noise_2rl[:, some].to(self.device))

        pulls, sums = self._contrast(parts(), len(rows))
        for index, (part, pull) in enumerate(zip(parts(), pulls, strict=True)):
            share = len(part.s1) / num_pairs
            last = index + 1 == len(rows)
            with self.parallel.no_sync() if self.parallel and not last else nullcontext():
                with self._autocast():
                    terms = (self.parallel or self.model)(*part, None if pull is None else pull / share)
                self.scaler.scale(terms["loss"] * share).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term.detach() * share
        return sums

    def _contrast(self, parts: Iterable[_Part], num_parts: int) -> tuple[Sequence[Tensor | None], dict[str, Tensor]]:
        """The contrastive terms over all micro-batches of all ranks, where there are several micro-batches.

        The features of all come first, without what a backward pass needs; the terms' gradient with respect to them
        is then carried through each micro-batch (GradCache, arXiv 2101.06983). So NT-Xent contrasts the global batch,
        whatever the micro-batch, for one more pass through the encoder.

        Returns:
            Each part's gradient (2, pairs, D), or None where the part is all there is; and the terms.
        """
        if num_parts == 1 or not self.model.loss.contrastive:
            return [None] * num_parts, {}
        with torch.no_grad(), self._autocast():
            features_2bd = [self.model.features(*part) for part in parts]
        features = torch.cat(features_2bd, dim=1).float().requires_grad_()
        terms = self.model.contrast(features)
        (gradient,) = torch.autograd.grad(terms["loss"], features)
        pulls = gradient.split([some.shape[1] for some in features_2bd], dim=1)
        return pulls, {name: term.detach() for name, term in terms.items()}

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
    from torch._dynamo import config as dynamo  # takes seconds

    torch.compiler.reset()
    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # until torch 2.6
    setattr(dynamo, name, max(getattr(dynamo, name), RECOMPILE_LIMIT))
    # A graph for each shape on GPUs: that of any shape fails there (an assertion of inductor, torch 2.11 on an H100).
    dynamic = False if model.encoder.norm.weight.is_cuda else None
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=dynamic)
