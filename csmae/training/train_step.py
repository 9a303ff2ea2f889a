"""One optimizer step on one rank: precision, micro-batches, compilation, and what happens when memory runs out.

R pairs of this rank, L patches, D width; 2 sensors.
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
from csmae.distributed import rank_and_world_size
from csmae.model.blocks import Block
from csmae.model.csmae import CSMAE
from csmae.out_of_memory import is_out_of_memory
from csmae.training.micro_batch import MicroBatch, SmallerMicroBatchError
from csmae.training.optim import make_optimizer

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Shapes for which torch may compile the blocks, which share one code object: sequence lengths of the sensors, query slices,
passes with and without gradients. A training has up to about a dozen; beyond torch's default of 8, blocks run uncompiled."""

Images = Callable[[slice], tuple[Tensor, Tensor]]
"""Preprocesses a slice of a rank's pairs: returns the images (pairs, C, H, W) of both sensors."""


class _Inputs(NamedTuple):
    """A micro-batch: the first arguments of ``CSMAE.forward``."""

    s1: Tensor
    s2: Tensor
    noise_s1: Tensor
    noise_s2: Tensor


class TrainStep:
    """The network with its optimizer: each call is one optimizer step. Collective.

    Args:
        model: On its device.
        config: The whole run.
        run_dir: Keeps a reduced micro-batch for later attempts, if given.

    Raises:
        ConfigError: ``train.compile`` without a C++ compiler, or not even one pair fits into memory.
    """

    def __init__(self, model: CSMAE, config: Config, run_dir: Path | None) -> None:
        self.model, self.device = model, model.encoder.norm.weight.device
        _, world_size = rank_and_world_size()
        self.micro_batch = MicroBatch(config, world_size, run_dir)
        self._agree_on_micro_batch(world_size)
        self.micro_batch.validate()
        self.optimizer = make_optimizer(model, config.optim)
        self.precision = autocast_dtype(config.train.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.compiled = config.train.compile
        if self.compiled:
            compile_blocks(model)
        self.parallel = _data_parallel(model) if world_size > 1 else None

    def __call__(self, images: Images, noise_2rl: Tensor) -> dict[str, Tensor]:
        """Take one optimizer step; returns the loss terms, detached.

        When memory runs out, the gradients are computed again with half the micro-batch. With several ranks that is
        impossible, because the others wait in a collective; so it is once weights may have changed. The smaller size
        is then saved for the next attempt, which resumes from the last checkpoint.

        Args:
            images: Called once or twice per micro-batch.
            noise_2rl: Uniform noise in [0, 1) that chooses both sensors' visible patches.

        Raises:
            SmallerMicroBatchError: The training must resume from its checkpoint.
            MemoryLimitError: Not even one pair fits into memory.
        """
        terms = self._compute_gradients(images, noise_2rl)
        try:
            self.scaler.step(self.optimizer)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._halve_micro_batch()
            raise SmallerMicroBatchError(self.micro_batch.size) from error
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return terms

    def uncompiled(self) -> AbstractContextManager[object]:
        """Compile nothing within this context: the batches of scores have other shapes than those of the training."""
        set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6; before, scores are compiled too
        return set_stance("force_eager") if self.compiled and set_stance else nullcontext()

    def _compute_gradients(self, images: Images, noise_2rl: Tensor) -> dict[str, Tensor]:
        """Compute the gradients with a micro-batch that fits into memory; returns the mean loss terms."""
        while True:
            try:
                return self._accumulate_gradients(images, noise_2rl)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_micro_batch()
                if self.parallel:
                    raise SmallerMicroBatchError(self.micro_batch.size) from error
            log.warning("out of memory: repeating the step with micro-batches of %d pairs", self.micro_batch.size)

    def _halve_micro_batch(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.micro_batch.halve()

    def _agree_on_micro_batch(self, world_size: int) -> None:
        """Take the smallest of the ranks' sizes: with other sizes they would call different collectives.

        Ranks read different limits if each has its own copy of the run's folder.
        """
        if world_size > 1:
            smallest = torch.tensor(self.micro_batch.size, device=self.device)
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
            self.micro_batch.size = int(smallest)

    def _accumulate_gradients(self, images: Images, noise_2rl: Tensor) -> dict[str, Tensor]:
        """Compute the gradients of this rank's pairs micro-batch by micro-batch; returns the mean loss terms."""
        num_pairs, size = noise_2rl.shape[1], self.micro_batch.size
        slices = [slice(start, min(start + size, num_pairs)) for start in range(0, num_pairs, size)]

        def micro_batches() -> Iterator[_Inputs]:
            for rows in slices:
                s1, s2 = images(rows)
                yield _Inputs(s1, s2, *noise_2rl[:, rows].to(self.device))

        cached_gradients, sums = self._cache_contrastive_gradients(micro_batches(), len(slices))
        for index, (inputs, cached) in enumerate(zip(micro_batches(), cached_gradients, strict=True)):
            fraction = len(inputs.s1) / num_pairs
            last = index + 1 == len(slices)
            with self.parallel.no_sync() if self.parallel and not last else nullcontext():
                with self._autocast():
                    terms = (self.parallel or self.model)(*inputs, None if cached is None else cached / fraction)
                self.scaler.scale(terms["loss"] * fraction).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term.detach() * fraction
        return sums

    def _cache_contrastive_gradients(
        self, micro_batches: Iterable[_Inputs], num_micro_batches: int
    ) -> tuple[Sequence[Tensor | None], dict[str, Tensor]]:
        """Compute the contrastive terms over all micro-batches of all ranks, if there are several micro-batches.

        The features of all micro-batches are computed first, without activations for a backward pass; the gradient of
        the terms with respect to the features is then backpropagated through each micro-batch (GradCache,
        arXiv 2101.06983). NT-Xent therefore contrasts the global batch whatever the micro-batch, for one more forward
        pass of the encoder.

        Returns:
            The gradient (2, pairs, D) for each micro-batch, or None if there is only one; and the terms, detached.
        """
        if num_micro_batches == 1 or not self.model.loss.contrastive:
            return [None] * num_micro_batches, {}
        with torch.no_grad(), self._autocast():
            features = [self.model.features(*inputs) for inputs in micro_batches]
        z_2rd = torch.cat(features, dim=1).float().requires_grad_()
        terms = self.model.contrast(z_2rd)
        (gradient_2rd,) = torch.autograd.grad(terms["loss"], z_2rd)
        cached_gradients = gradient_2rd.split([part.shape[1] for part in features], dim=1)
        return cached_gradients, {name: term.detach() for name, term in terms.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for a ``train.precision``; losses stay in float32."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def compile_blocks(model: CSMAE) -> None:
    """Compile the transformer blocks with ``torch.compile``; blocks of one shape share their code.

    The code of earlier networks of this process is dropped first: a train worker trains many, and torch would reach its
    recompilation limit or keep the code of all of them.

    Raises:
        ConfigError: This machine has no C++ compiler.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise ConfigError(
            "train.compile needs a C++ compiler, and this machine has none: install g++, or set it to false"
        )
    from torch._dynamo import config as dynamo  # takes seconds to import

    torch.compiler.reset()
    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # until torch 2.6
    setattr(dynamo, name, max(getattr(dynamo, name), RECOMPILE_LIMIT))
    # One graph per shape on GPUs: dynamic shapes fail there (an assertion of inductor, torch 2.11 on an H100).
    dynamic = False if model.encoder.norm.weight.is_cuda else None
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=dynamic)


def _data_parallel(model: CSMAE) -> DistributedDataParallel:
    ids = [model.encoder.norm.weight.device] if model.encoder.norm.weight.is_cuda else None
    with warnings.catch_warnings():
        # The replacement, forward_sync_buffers, exists only in torch 2.13 and newer.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # Buffers are constants: there is nothing to broadcast.
        return DistributedDataParallel(model, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
