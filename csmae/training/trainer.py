"""The training loop, the same in one process, under torchrun and in Ray Train's workers.

B pairs of the global batch, R pairs of this rank, L patches.
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
from torch import Tensor, nn

from csmae.changes import config_at
from csmae.config import Config, one_line
from csmae.data.loader import batches, epoch_rows
from csmae.data.pairs import PairBatch
from csmae.data.transforms import Preprocess
from csmae.distributed import all_gather, any_rank, default_device, rank_and_world_size
from csmae.encoders import SensorEncoder
from csmae.model.cost import cost_metrics
from csmae.model.csmae import build_model
from csmae.retrieval.embed import embed
from csmae.storage.layout import CHECKPOINT
from csmae.training.checkpoint import (
    CheckpointError,
    FullDiskError,
    TrainingProgress,
    copy_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from csmae.training.history import append_metrics
from csmae.training.micro_batch import scores_must_fit, weights_must_fit
from csmae.training.optim import allocate_moments, learning_rate, set_options
from csmae.training.scoring import validation_scores
from csmae.training.snapshots import is_due, write_snapshot
from csmae.training.splits import train_split, validate_run, validation_split
from csmae.training.term_sums import TermSums
from csmae.training.train_step import Images, TrainStep
from csmae.training.usage import ResourceUsage

SYNC_EVERY = 16
"""Steps between checks of the loss and of stop requests. Each check waits for the device and for the other ranks."""

OnStep = Callable[[int, int], bool | None]
"""Called with the steps done in this epoch and their total; returns True to request a stop."""


class DivergedError(RuntimeError):
    """The loss is not finite. Raised on all ranks."""


class StoppedError(RuntimeError):
    """A rank requested a stop inside an epoch, and the checkpoint is saved. Raised on all ranks."""


@dataclass(frozen=True)
class Epoch:
    """Result of one epoch."""

    number: int
    """1-based."""
    metrics: dict[str, float]
    """``train/…``, ``val/…``, ``time/…``, ``system/…`` and ``cost/…`` (see ``csmae.model.cost``), equal on all ranks."""


def pretrain(
    config: Config,
    run_dir: Path | None = None,
    device: str | None = None,
    on_step: OnStep | None = None,
    until: int | None = None,
    parent_dir: Path | None = None,
) -> Generator[Epoch, None, None]:
    """Pretrain a CSMAE; yields after each epoch. Close the generator to stop early.

    Collective over ``torch.distributed`` if it is initialized.

    Args:
        config: The whole run.
        run_dir: One folder for all ranks; receives ``checkpoint.pt``, ``metrics.jsonl``, ``encoder/`` and ``arrays/``. A
            checkpoint in it is resumed. If None, nothing is written.
        device: Such as ``cuda:0``; if None, the GPU of this process, or the CPU.
        on_step: Called after each step, because an epoch may take hours. If it returns True on any rank, all ranks save a
            checkpoint and stop within ``SYNC_EVERY`` steps.
        until: Last epoch of this call, which saves a checkpoint, so that another call continues; by default, and at most,
            ``train.epochs``.
        parent_dir: Folder of another training, from whose checkpoint this one starts if its own folder has none; see
            ``copy_checkpoint``.

    Yields:
        The result of each epoch that the checkpoint does not contain.

    Raises:
        DivergedError: The loss is not finite; on all ranks.
        StoppedError: ``on_step`` requested a stop; on all ranks.
        ConfigError: The archive, the checkpoint or the memory does not fit the configuration; on all ranks, except for
            the memory.
        SmallerMicroBatchError: A rank ran out of memory; the next call resumes from the checkpoint with smaller
            micro-batches.
        FullDiskError: The checkpoint cannot be written; on all ranks.
        ArchiveError: A pair is damaged; on the rank that reads it.
    """
    compute_device = torch.device(device) if device else default_device()
    usage, num_epochs = ResourceUsage(compute_device), config.train.epochs
    last = min(until or num_epochs, num_epochs)
    with weights_must_fit(config):
        trainer = Trainer(config, compute_device, run_dir)
        progress = trainer.resume(parent_dir)
        allocate_moments(trainer.train_step.optimizer)
    for number in range(progress.epochs + 1, last + 1):
        start = time.perf_counter() - progress.elapsed_s
        metrics = trainer.train_epoch(progress, on_step)
        if number == num_epochs or number % config.eval.every == 0:
            metrics |= trainer.score_validation()
        metrics |= cost_metrics(trainer.config_now) | trainer.worker_time(time.perf_counter() - start) | usage.measure()
        if run_dir and trainer.rank == 0:
            append_metrics(run_dir, number, metrics)
        progress = TrainingProgress(number)
        if number == last or number % config.train.checkpoint_every == 0:
            trainer.save(progress, metrics)
        if is_due(number, num_epochs):
            trainer.write_snapshot(number)
        yield Epoch(number, metrics)


class Trainer:
    """The network, its data and its optimizer on one rank. Lives in a train worker. Collective."""

    def __init__(self, config: Config, device: torch.device, run_dir: Path | None) -> None:
        self.config, self.device, self.run_dir = config, device, run_dir
        self.config_now = config
        """With the values that hold in the present epoch: ``train.changes`` may change them."""
        self.rank, self.world_size = rank_and_world_size()
        archive = validate_run(config, self.world_size)
        self.train_split = train_split(archive, config)
        self.validation_split = validation_split(archive, config)
        self.validation_features: dict[str, Tensor] | None = None
        """Features of the validation scenes, if the epoch was scored."""
        self.model = build_model(config).to(device)
        self.preprocess = Preprocess(config.data, config.model.img_size).to(device)
        self.train_step = TrainStep(self.model, config, run_dir)

    @property
    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler]:
        """The parts whose state a checkpoint holds."""
        return {"model": self.model, "optimizer": self.train_step.optimizer, "scaler": self.train_step.scaler}

    def encoder(self) -> SensorEncoder:
        """The network's encoder as it is saved; shares the network's weights."""
        return SensorEncoder.from_model(self.model, self.config)

    def train_epoch(self, progress: TrainingProgress, on_step: OnStep | None = None) -> dict[str, float]:
        """Train the epoch that follows ``progress``, from the step where it stopped.

        Returns:
            Means of the loss terms over the whole epoch, learning rate, micro-batch, speed and duration.

        Raises:
            DivergedError: The loss is not finite.
            StoppedError: ``on_step`` requested a stop; the checkpoint is saved.
        """
        start, optim, epoch = time.perf_counter() - progress.elapsed_s, self.config.optim, progress.epochs
        self._change_values(epoch)
        rows = epoch_rows(
            len(self.train_split), optim.batch_size, self.config.train.seed, epoch, self.rank, self.world_size
        )
        self.model.train()
        self.validation_features = None
        sums = TermSums(progress.term_sums, self.device)
        lr, stop_requested = 0.0, False
        with closing(batches(self.train_split, rows[progress.steps :], self.device)) as loaded:
            for steps_done, batch in enumerate(loaded, start=progress.steps + 1):
                step = epoch * len(rows) + steps_done - 1
                lr = self._set_learning_rate(step, len(rows))
                sums.add(self.train_step(*self._augment(step, batch)))
                stop_requested |= bool(on_step and on_step(steps_done, len(rows)))
                if steps_done % SYNC_EVERY == 0:
                    _check_finite(sums.means(steps_done), epoch)
                    if any_rank(stop_requested, self.device):
                        self._stop(TrainingProgress(epoch, steps_done, time.perf_counter() - start), sums)
        means = sums.means(len(rows))
        _check_finite(means, epoch)
        seconds = time.perf_counter() - start
        return {f"train/{name}": value for name, value in means.items()} | {
            "train/lr": lr,
            "train/micro_batch": float(self.train_step.micro_batch.size),
            "train/pairs_per_s": len(rows) * optim.batch_size / seconds,
            "time/epoch_s": seconds,
        }

    def score_validation(self) -> dict[str, float]:
        """Retrieval scores within the validation split, equal on all ranks."""
        start = time.perf_counter()
        self.model.eval()
        with self.train_step.uncompiled(), scores_must_fit(len(self.validation_split)):
            self.validation_features = embed(self.encoder(), self.validation_split, self.config.eval.batch_size)
            scores = validation_scores(self.validation_features, self.validation_split, self.config.eval.k)
        return scores | {"time/eval_s": time.perf_counter() - start}

    def worker_time(self, seconds: float) -> dict[str, float]:
        """Worker-seconds of an epoch of this duration, and GPU-seconds if there are GPUs."""
        worker_s = seconds * self.world_size
        return {"time/worker_s": worker_s} | ({"time/gpu_s": worker_s} if self.device.type == "cuda" else {})

    def resume(self, parent_dir: Path | None = None) -> TrainingProgress:
        """Load the checkpoint of the run's folder, if there is one, else that of its parent, and save it as the run's own.

        Raises:
            CheckpointError: It does not match the configuration, or the ranks see different checkpoints; on all ranks.
        """
        if self.run_dir is None:
            return TrainingProgress()
        parent_dir = None if (self.run_dir / CHECKPOINT).exists() else parent_dir
        load = copy_checkpoint if parent_dir else load_checkpoint
        progress = load(parent_dir or self.run_dir, self.config, self.parts)
        states = all_gather(torch.tensor([progress.epochs, progress.steps], device=self.device)).tolist()
        if min(states) != max(states):
            (earliest, _), (latest, _) = min(states), max(states)
            raise CheckpointError(
                f"{self.run_dir}: must be one folder for all workers: they find {earliest} and {latest} epochs in it"
            )
        if parent_dir:  # now, because the parent's own training may continue
            self.save(progress)
        return progress

    def save(self, progress: TrainingProgress, metrics: dict[str, float] | None = None) -> None:
        """Write the checkpoint, and with metrics also the encoder; rank 0 writes. Without a run's folder, do nothing.

        Raises:
            FullDiskError: They cannot be written; on all ranks.
        """
        if self.run_dir is None:
            return
        epoch = progress.epochs + bool(progress.steps)
        failure: FullDiskError | None = None
        if self.rank == 0:
            try:
                if metrics is not None:
                    self.encoder().save(self.run_dir / "encoder", {"epoch": epoch, "metrics": metrics})
                save_checkpoint(self.run_dir, self.config, progress, self.parts)
            except (OSError, RuntimeError) as error:  # torch's writer turns one into the other
                reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
                failure = FullDiskError(
                    f"{self.run_dir}: epoch {epoch} cannot be written ({reason}): the last good checkpoint is still there; "
                    "free some space and run again"
                )
        if any_rank(failure is not None, self.device):
            raise failure or FullDiskError(
                f"{self.run_dir}: rank 0 cannot write epoch {epoch}: see its log, free some space there and run again"
            )

    def write_snapshot(self, number: int) -> None:
        """Write the arrays that the plots of an epoch show; rank 0 writes."""
        if self.run_dir and self.rank == 0:
            path = self.run_dir / "arrays" / f"epoch-{number:04}.npz"
            with self.train_step.uncompiled():
                write_snapshot(
                    path, self.model.eval(), self.config_now, self.validation_split, self.validation_features
                )

    def _stop(self, progress: TrainingProgress, sums: TermSums) -> None:
        """Save a checkpoint inside an epoch, and raise ``StoppedError``."""
        self.save(replace(progress, term_sums=sums.gather()))
        raise StoppedError(f"stopped after step {progress.steps} of epoch {progress.epochs + 1}")

    def _change_values(self, epoch: int) -> None:
        """Use the values that hold after this many complete epochs."""
        self.config_now = config_at(self.config, epoch)
        self.model.masking, self.model.loss = self.config_now.masking, self.config_now.loss
        set_options(self.train_step.optimizer, self.config_now.optim)

    def _set_learning_rate(self, step: int, steps_per_epoch: int) -> float:
        lr = learning_rate(step, steps_per_epoch, self.config_now.optim, self.config.train.epochs)
        for group in self.train_step.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _augment(self, step: int, batch: PairBatch) -> tuple[Images, Tensor]:
        """A function that preprocesses and flips images of this rank, and masking noise (2, R, L).

        Every rank draws the randomness of the whole global batch from (seed, step), so neither the number of workers
        nor an interruption changes it.
        """
        num_pairs, data = self.config.optim.batch_size, self.config_now.data
        random = np.random.default_rng([self.config.train.seed, step])
        flips_b2 = random.random((num_pairs, 2)) < (data.horizontal_flip, data.vertical_flip)
        noise_2bl = random.random((2, num_pairs, self.config.model.num_patches), dtype=np.float32)
        pairs_per_rank = num_pairs // self.world_size
        local = slice(self.rank * pairs_per_rank, (self.rank + 1) * pairs_per_rank)
        flips_r2 = torch.from_numpy(flips_b2[local])

        def images(rows: slice) -> tuple[Tensor, Tensor]:
            s1, s2 = self.preprocess(batch.select(rows).to(self.device), flips_r2[rows].to(self.device))
            return s1, s2

        return images, torch.from_numpy(noise_2bl[:, local])


def _check_finite(means: dict[str, float], epoch: int) -> None:
    """Raise ``DivergedError`` if a mean of a loss term, which is the same on all ranks, is not finite."""
    if bad := ", ".join(name for name, value in means.items() if not math.isfinite(value)):
        raise DivergedError(f"the loss is not finite in epoch {epoch + 1} ({bad}): lower optim.lr or the loss weights")
