"""The one training loop: one process, torchrun or Ray alike.

B pairs of the global batch, R pairs of this rank's share of it, L patches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from csmae.config import Config, ConfigError
from csmae.data.archive import Archive, open_archive
from csmae.data.loader import batches, epoch_rows
from csmae.data.pairs import PairBatch
from csmae.encoders import SensorEncoder
from csmae.model.cost import cost
from csmae.retrieval.embed import embed
from csmae.training.checkpoint import CheckpointError, Done, FullDiskError, load_checkpoint, save_checkpoint
from csmae.training.history import append_metrics
from csmae.training.micro_batch import scores_must_fit, weights_must_fit
from csmae.training.optim import learning_rate
from csmae.training.scoring import default_device, encoder_of, seeded_model, subset, validation_scores, validation_split
from csmae.training.snapshots import is_due, write_snapshot
from csmae.training.step import Images, Stepper
from csmae.training.usage import Usage

LOOK_EVERY = 16
"""Steps between looks at the loss, and at whether to stop: each look waits for the device and for the other ranks."""


class DivergedError(RuntimeError):
    """The loss is not finite any more. Raised on all ranks alike."""


class StoppedError(RuntimeError):
    """A rank was asked to stop in the middle of an epoch; the checkpoint has all until there. Raised on all ranks alike."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave."""

    number: int
    """Epochs done, from 1."""
    metrics: dict[str, float]
    """``train/…``, ``val/…``, ``time/…``, ``system/…`` and ``cost/…`` (see ``csmae.model.cost``), the same on all ranks."""


def pretrain(
    config: Config,
    run_dir: Path | None = None,
    device: str | None = None,
    on_step: Callable[[int, int], bool | None] | None = None,
) -> Generator[Epoch, None, None]:
    """Pretrain a CSMAE, one epoch a step of the generator.

    Collective over ``torch.distributed`` where it is initialised. Close the generator to stop early.

    Args:
        config: The whole run.
        run_dir: One folder for all ranks; gets ``checkpoint.pt``, ``metrics.jsonl``, ``encoder/`` and ``arrays/``; a checkpoint in it is
            gone on from. Nothing is written where None.
        device: Such as ``cuda:0``; the rank's GPU, or the CPU, where None.
        on_step: Called after each step with the steps done in this epoch and their number: an epoch may take hours. Where
            it returns True on a rank, all save and stop within ``LOOK_EVERY`` steps.

    Yields:
        Each epoch's metrics, from the first that is not in the checkpoint.

    Raises:
        DivergedError: The loss is not finite, on all ranks alike. ``StoppedError``: ``on_step`` asked for it.
        ConfigError: The archive, the checkpoint or the memory does not fit the configuration; on all ranks alike, but for
            the memory.
        SmallerMicroBatchError: A rank's memory is too small; the training goes on from its checkpoint with smaller
            micro-batches when it is begun again.
        FullDiskError: The checkpoint cannot be written, on all ranks alike. ``ArchiveError``: A pair is damaged; on the rank that reads it.
    """
    place = torch.device(device or default_device())
    usage = Usage(place)
    with weights_must_fit(config):
        run = _Run(config, place, run_dir)
        done = run.resume(run_dir) if run_dir else Done()
        run.step.allocate()
    price = {f"cost/{name}": float(value) for name, value in cost(config)._asdict().items()}
    for epoch in range(done.epochs, config.train.epochs):
        last = epoch + 1 == config.train.epochs
        begun, done = done, Done(epoch + 1)
        start = time.perf_counter() - begun.seconds
        metrics = run.train(begun, on_step or _silent)
        if last or (epoch + 1) % config.eval.every == 0:
            metrics |= run.validate()
        metrics |= price | run.spent(time.perf_counter() - start) | usage.measure()
        if run_dir and run.rank == 0:
            append_metrics(run_dir, epoch + 1, metrics)
        if run_dir and (last or (epoch + 1) % config.train.checkpoint_every == 0):
            run.save(run_dir, done, metrics)
        if run_dir and run.rank == 0 and is_due(epoch + 1, config.train.epochs):
            path = run_dir / "arrays" / f"epoch-{epoch + 1:04}.npz"
            with run.step.eager():
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
        self.config, self.device, self.run_dir = config, device, run_dir
        parallel = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        archive = check(config, self.world_size)
        self.train_split = subset(archive.split("train"), config.data.max_train_pairs, config.train.seed)
        self.validation = validation_split(archive, config)
        self.features: dict[str, Tensor] | None = None
        """Of the validation scenes, where the epoch was scored."""
        self.model = seeded_model(config).to(device)
        self.prepare = self.encoder().prepare
        self.step = Stepper(self.model, config, run_dir)

    @property
    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler]:
        """What a checkpoint holds."""
        return {"model": self.model, "optimizer": self.step.optimizer, "scaler": self.step.scaler}

    def encoder(self) -> SensorEncoder:
        """The network's encoder as users take it home, sharing its weights."""
        return encoder_of(self.model, self.config)

    def train(self, begun: Done, on_step: Callable[[int, int], bool | None]) -> dict[str, float]:
        """The rest of a pass over the training split; returns the means of the loss terms over the whole."""
        start, optim, epoch = time.perf_counter() - begun.seconds, self.config.optim, begun.epochs
        rows = epoch_rows(
            len(self.train_split), optim.batch_size, self.config.train.seed, epoch, self.rank, self.world_size
        )
        self.model.train()
        self.features = None
        sums = {name: self._own(ranks) for name, ranks in begun.sums.items()}
        rate, asked = 0.0, False
        with closing(batches(self.train_split, rows[begun.steps :], self.device)) as loaded:
            for index, batch in enumerate(loaded, start=begun.steps):
                step = epoch * len(rows) + index
                rate = self._set_rate(step, len(rows))
                for name, term in self.step(*self._augment(step, batch)).items():
                    sums[name] = sums.get(name, torch.zeros((), device=self.device)) + term
                asked = bool(on_step(index + 1, len(rows))) or asked
                if index % LOOK_EVERY == LOOK_EVERY - 1:
                    self._means(sums, index + 1, epoch)
                    if self._any(asked):
                        self._stop(Done(epoch, index + 1, time.perf_counter() - start), sums)
        means = self._means(sums, len(rows), epoch)
        seconds = time.perf_counter() - start
        course = {
            "train/lr": rate,
            "train/micro_batch": float(self.step.memory.micro_batch),
            "train/pairs_per_s": len(rows) * optim.batch_size / seconds,
            "time/epoch_s": seconds,
        }
        return {f"train/{name}": value for name, value in means.items()} | course

    def validate(self) -> dict[str, float]:
        """Retrieval scores within the validation split, the same on all ranks."""
        start = time.perf_counter()
        self.model.eval()
        with self.step.eager(), scores_must_fit(len(self.validation)):
            self.features = embed(self.encoder(), self.validation, self.config.eval.batch_size)
            scores = validation_scores(self.features, self.validation, self.config.eval.k)
        return scores | {"time/eval_s": time.perf_counter() - start}

    def spent(self, seconds: float) -> dict[str, float]:
        """What an epoch of so many seconds used: worker-seconds, and GPU-seconds where there are GPUs."""
        used = seconds * self.world_size
        return {"time/worker_s": used} | ({"time/gpu_s": used} if self.device.type == "cuda" else {})

    def resume(self, folder: Path) -> Done:
        """Load the folder's checkpoint; returns how far it is.

        Raises:
            CheckpointError: It does not fit, or the ranks do not see the same; on all ranks alike.
        """
        done = load_checkpoint(folder, self.config, self.parts)
        if self.world_size > 1:
            states = self._gathered(torch.tensor([done.epochs, done.steps], device=self.device)).tolist()
            if min(states) != max(states):
                (earliest, _), (latest, _) = min(states), max(states)
                raise CheckpointError(
                    f"{folder}: must be one folder for all workers: they find {earliest} and {latest} epochs in it"
                )
        return done

    def save(self, folder: Path, done: Done, metrics: dict[str, float] | None = None) -> None:
        """Write the checkpoint, and the encoder where it has metrics, by rank 0.

        Raises:
            FullDiskError: They cannot be written; on all ranks alike.
        """
        failed: FullDiskError | None = None
        epoch = done.epochs + bool(done.steps)
        if self.rank == 0:
            try:
                if metrics is not None:
                    self.encoder().save(folder / "encoder", {"epoch": epoch, "metrics": metrics})
                save_checkpoint(folder, self.config, done, self.parts)
            except (OSError, RuntimeError) as error:  # torch's writer makes the one into the other
                reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:120]
                failed = FullDiskError(
                    f"{folder}: epoch {epoch} cannot be written ({reason}): the last good checkpoint is still there; "
                    "make room and run again"
                )
        if self._any(failed is not None):
            raise failed or FullDiskError(
                f"{folder}: epoch {epoch} cannot be written by rank 0: see its log, make room there and run again"
            )

    def _stop(self, done: Done, sums: dict[str, Tensor]) -> None:
        if self.run_dir:
            ranks = self._gathered(torch.stack(list(sums.values()))).cpu().unbind(1)
            self.save(self.run_dir, replace(done, sums=dict(zip(sums, ranks, strict=True))))
        raise StoppedError(f"stopped after step {done.steps} of epoch {done.epochs + 1}")

    def _own(self, ranks: Tensor) -> Tensor:
        """This rank's part of a sum (ranks,) that a group of perhaps another size left."""
        if len(ranks) == self.world_size:
            return ranks[self.rank].to(self.device)
        return (ranks.sum() * (self.rank == 0) * self.world_size / len(ranks)).to(self.device)

    def _gathered(self, own: Tensor) -> Tensor:
        """Each rank's tensor, (ranks, …)."""
        if self.world_size == 1:
            return own[None]
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        return torch.stack(parts)

    def _any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self._gathered(torch.tensor(here, dtype=torch.uint8, device=self.device)).any())

    def _set_rate(self, step: int, steps_per_epoch: int) -> float:
        optim, train = self.config.optim, self.config.train
        rate = learning_rate(step, train.epochs * steps_per_epoch, optim.warmup_epochs * steps_per_epoch, optim.lr)
        for group in self.step.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _augment(self, step: int, batch: PairBatch) -> tuple[Images, Tensor]:
        """What prepares images, and masking noise (2, R, L), of this rank's share of a global batch.

        The whole batch's randomness is drawn from (seed, step) on every rank, so neither the number of workers nor
        an interruption changes it.
        """
        size, data = self.config.optim.batch_size, self.config.data
        random = np.random.default_rng([self.config.train.seed, step])
        flips = random.random((size, 2)) < (data.horizontal_flip, data.vertical_flip)
        noise = random.random((2, size, self.config.model.num_patches), dtype=np.float32)
        share = size // self.world_size
        own = slice(self.rank * share, (self.rank + 1) * share)
        flips_r2 = torch.from_numpy(flips[own])

        def images(rows: slice) -> tuple[Tensor, Tensor]:
            s1, s2 = self.prepare(batch.some(rows).to(self.device), flips_r2[rows].to(self.device))
            return s1, s2

        return images, torch.from_numpy(noise[:, own])

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


def _silent(step: int, num_steps: int) -> None:
    """What is told of a step where nobody asked."""
