"""The one training loop: one process, torchrun or Ray alike.

B pairs of the global batch, R pairs of this rank's share of it, L patches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from csmae import retrieval
from csmae.config import Config, ConfigError
from csmae.data.archive import Archive, open_archive
from csmae.data.loader import batches, epoch_rows
from csmae.data.pairs import PairBatch
from csmae.encoders import SensorEncoder
from csmae.training.checkpoint import load_checkpoint, save_checkpoint
from csmae.training.memory import MicroBatch
from csmae.training.optim import learning_rate, make_optimizer
from csmae.training.scoring import default_device, encoder_of, seeded_model, subset, validation_scores, validation_split
from csmae.training.snapshots import is_due, write_snapshot
from csmae.training.usage import Usage

FINITE_CHECK_EVERY = 16
"""Steps between looks at the loss: each look waits for the device and for the other ranks."""


class DivergedError(RuntimeError):
    """The loss is not finite any more. Raised on all ranks alike."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave."""

    number: int
    """Epochs done, from 1."""
    metrics: dict[str, float]
    """``train/…``, ``val/…``, ``time/…`` and ``system/…``, the same on all ranks."""


def pretrain(
    config: Config,
    run_dir: Path | None = None,
    device: str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Generator[Epoch, None, None]:
    """Pretrain a CSMAE, one epoch a step of the generator.

    Collective over ``torch.distributed`` where it is initialised. Close the generator to stop early.

    Args:
        config: The whole run.
        run_dir: Gets ``checkpoint.pt``, ``encoder/`` and ``arrays/``; a checkpoint in it is gone on from. Nothing is written
            where None.
        device: Such as ``cuda:0``; the rank's GPU, or the CPU, where None.
        on_step: Called after each step with the steps done in this epoch and their number: an epoch may take hours.

    Yields:
        Each epoch's metrics, from the first that is not in the checkpoint.

    Raises:
        DivergedError: The loss is not finite, on all ranks alike.
        ConfigError: The archive or the checkpoint does not fit the configuration.
    """
    run = _Run(config, torch.device(device or default_device()), run_dir)
    done = load_checkpoint(run_dir, config, run.parts, run.device) if run_dir else 0
    usage = Usage(run.device)
    for epoch in range(done, config.train.epochs):
        last = epoch + 1 == config.train.epochs
        metrics = run.train(epoch, on_step or _silent)
        if last or (epoch + 1) % config.eval.every == 0:
            metrics |= run.validate()
        metrics |= usage.measure()
        if run_dir and run.rank == 0 and (last or (epoch + 1) % config.train.checkpoint_every == 0):
            run.encoder().save(run_dir / "encoder", {"epoch": epoch + 1, "metrics": metrics})
            save_checkpoint(run_dir, config, epoch + 1, run.parts)
        if run_dir and run.rank == 0 and is_due(epoch + 1, config.train.epochs):
            path = run_dir / "arrays" / f"epoch-{epoch + 1:04}.npz"
            write_snapshot(path, run.model.eval(), config, run.validation, run.features)
        yield Epoch(epoch + 1, metrics)


def check(config: Config, world_size: int = 1) -> Archive:
    """Make sure that the configuration can be trained and scored, before anything is reserved for it.

    Raises:
        ConfigError: The archive cannot be opened, a split is too small, or the batch does not divide.
    """
    archive = open_archive(config.data)
    batch, k = config.optim.batch_size, config.eval.k
    if batch % world_size:
        raise ConfigError(
            f"optim.batch_size must be a multiple of the workers of a trial: {batch} pairs on {world_size} workers"
        )
    sizes = {name: len(archive.split(name)) for name in ("train", "validation", "test")}
    train = min(sizes["train"], config.data.max_train_pairs or sizes["train"])
    if batch > train:
        raise ConfigError(
            f"optim.batch_size {batch} is larger than the training split: {train} pairs in {config.data.path}"
        )
    half = min(sizes["validation"], config.eval.max_pairs or sizes["validation"]) // 2
    for name, found in (("half of the validation split", half), ("the test split", sizes["test"])):
        if found < k:
            raise ConfigError(
                f"eval.k {k} needs as many scenes to retrieve from: {name} of {config.data.path} has {found}"
            )
    return archive


class _Run:
    """The moving parts of one training on one rank."""

    def __init__(self, config: Config, device: torch.device, run_dir: Path | None) -> None:
        self.config, self.device = config, device
        parallel = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        archive = check(config, self.world_size)
        self.train_split = subset(archive.split("train"), config.data.max_train_pairs, config.train.seed)
        self.validation = validation_split(archive, config)
        self.memory = MicroBatch(config, self.world_size, run_dir)
        self.features: dict[str, Tensor] | None = None
        """Of the validation scenes, where the epoch was scored."""
        self.model = seeded_model(config).to(device)
        self.prepare = self.encoder().prepare
        self.optimizer = make_optimizer(self.model, config.optim)
        self.precision = autocast_type(config.train.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.step_model: nn.Module = self.model
        if self.world_size > 1:
            ids = [device] if device.type == "cuda" else None
            self.step_model = DistributedDataParallel(self.model, ids, gradient_as_bucket_view=True)

    @property
    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler]:
        """What a checkpoint holds."""
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def encoder(self) -> SensorEncoder:
        """The network's encoder as users take it home, sharing its weights."""
        return encoder_of(self.model, self.config)

    def train(self, epoch: int, on_step: Callable[[int, int], None]) -> dict[str, float]:
        """One pass over the training split; returns the means of the loss terms."""
        start, optim = time.perf_counter(), self.config.optim
        rows = epoch_rows(
            len(self.train_split), optim.batch_size, self.config.train.seed, epoch, self.rank, self.world_size
        )
        self.model.train()
        self.features = None
        sums: dict[str, Tensor] = {}
        rate = 0.0
        with closing(batches(self.train_split, rows, pin=self.device.type == "cuda")) as loaded:
            for index, batch in enumerate(loaded):
                step = epoch * len(rows) + index
                rate = self._set_rate(step, len(rows))
                s1, s2, noise = self._augment(step, batch)
                for name, term in self._update(s1, s2, noise).items():
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term
                on_step(index + 1, len(rows))
                if index % FINITE_CHECK_EVERY == FINITE_CHECK_EVERY - 1:
                    self._means(sums, index + 1, epoch)
        means = self._means(sums, len(rows), epoch)
        seconds = time.perf_counter() - start
        course = {
            "train/lr": rate,
            "train/micro_batch": float(self.memory.micro_batch),
            "train/pairs_per_s": len(rows) * optim.batch_size / seconds,
            "time/epoch_s": seconds,
        }
        return {f"train/{name}": value for name, value in means.items()} | course

    def validate(self) -> dict[str, float]:
        """Retrieval scores within the validation split, the same on all ranks."""
        start = time.perf_counter()
        self.model.eval()
        self.features = retrieval.embed(self.encoder(), self.validation, self.config.eval.batch_size)
        scores = validation_scores(self.features, self.validation, self.config.eval.k)
        return scores | {"time/eval_s": time.perf_counter() - start}

    def _set_rate(self, step: int, steps_per_epoch: int) -> float:
        optim, train = self.config.optim, self.config.train
        rate = learning_rate(step, train.epochs * steps_per_epoch, optim.warmup_epochs * steps_per_epoch, optim.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _augment(self, step: int, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Prepared images and masking noise (2, R, L) of this rank's share of a global batch.

        The whole batch's randomness is drawn from (seed, step) on every rank, so neither the number of workers nor
        an interruption changes it.
        """
        size, data = self.config.optim.batch_size, self.config.data
        random = np.random.default_rng([self.config.train.seed, step])
        flips = random.random((size, 2)) < (data.horizontal_flip, data.vertical_flip)
        noise = random.random((2, size, self.config.model.num_patches), dtype=np.float32)
        share = size // self.world_size
        own = slice(self.rank * share, (self.rank + 1) * share)
        s1, s2 = self.prepare(batch.to(self.device), torch.from_numpy(flips[own]).to(self.device))
        return s1, s2, torch.from_numpy(noise[:, own]).to(self.device)

    def _update(self, s1: Tensor, s2: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One optimiser step; returns the loss terms, detached.

        Out of memory, the step is repeated with half the micro-batch. With other ranks that is not possible here: they
        wait in a collective. ``pretrain`` then leaves the smaller size for the next attempt.
        """
        while True:
            try:
                terms = self._accumulate(s1, s2, noise)
                break
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                self.memory.halve()
                if self.world_size > 1:
                    raise
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return terms

    def _accumulate(self, s1: Tensor, s2: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Gradients of this rank's share, one micro-batch after another; returns the mean loss terms."""
        sums: dict[str, Tensor] = {}
        parts = list(
            zip(*(t.split(self.memory.micro_batch, dim) for t, dim in ((s1, 0), (s2, 0), (noise, 1))), strict=True)
        )
        for index, (part_s1, part_s2, part_noise) in enumerate(parts):
            parallel = self.step_model if isinstance(self.step_model, DistributedDataParallel) else None
            with parallel.no_sync() if parallel and index + 1 < len(parts) else nullcontext():
                with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
                    terms: dict[str, Tensor] = self.step_model(part_s1, part_s2, part_noise[0], part_noise[1])
                share = len(part_s1) / len(s1)
                self.scaler.scale(terms["loss"] * share).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term.detach().float() * share
        return sums

    def _means(self, sums: dict[str, Tensor], num_steps: int, epoch: int) -> dict[str, float]:
        """Means over steps and ranks; raises where one is not finite, on all ranks alike."""
        stacked = torch.stack(list(sums.values())) / num_steps / self.world_size
        if self.world_size > 1:
            dist.all_reduce(stacked)
        means = dict(zip(sums, stacked.tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            bad = ", ".join(name for name, value in means.items() if not math.isfinite(value))
            raise DivergedError(
                f"the loss is not finite in epoch {epoch + 1} ({bad}): lower optim.lr or the loss weights"
            )
        return means


def autocast_type(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products; losses stay in float32."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _silent(step: int, num_steps: int) -> None:
    """What is told of a step where nobody asked."""
