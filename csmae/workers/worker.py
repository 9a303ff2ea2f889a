"""The part of a worker group that trains: one process per rank."""

from __future__ import annotations

import gc
import importlib
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.collective import broadcast_from_rank_zero

from csmae.cluster.ray_private import preemption_check
from csmae.config import Config, ConfigError
from csmae.workers.messages import Assignment, Outcome
from csmae.workers.spec import WorkerGroupSpec
from csmae.workers.trial_files import (
    config_fingerprint,
    remove_stale_copies,
    saved_epoch,
    working_copy,
    working_copy_dir,
)

MAX_COMPILED_TRIALS = 8
"""Compiled trials after which a group's processes are replaced: torch keeps memory of each one."""

HEARTBEATS_PER_TIMEOUT = 20
"""Heartbeats that a worker sends within the hang timeout."""


def train_loop(config: dict[str, Any]) -> None:
    """Train one assignment after another until the coordinator closes, or the group must be replaced.

    Process: every train worker; Ray Train calls it with the group's ``coordinator`` and ``spec``.
    """
    import torch

    coordinator, spec = config["coordinator"], config["spec"]
    torch.set_num_threads(max(1, round(spec.allocation.cpus_per_worker)))
    attempt = broadcast_from_rank_zero(uuid.uuid4().hex)
    worker = TrainWorker(coordinator, attempt, train.get_context().get_world_rank(), spec)
    actor = ray.get_runtime_context().current_actor
    importlib.import_module(spec.pretrain.partition(":")[0])  # takes seconds: before the first trial arrives
    last_id = num_compiled = 0
    while (assignment := ray.get(coordinator.next_assignment.remote(attempt, last_id, actor))) is not None:
        ready = worker.train(assignment)
        num_compiled += assignment.config["train"]["compile"]
        if not ready or num_compiled == MAX_COMPILED_TRIALS:
            return
        last_id = assignment.id
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if spec.remote:
        remove_stale_copies()


@dataclass(frozen=True)
class TrainWorker:
    """One rank of a worker group. Process: its train worker."""

    coordinator: Any
    attempt: str
    """Id that all ranks share until Ray Train restarts them."""
    rank: int
    spec: WorkerGroupSpec

    def train(self, assignment: Assignment) -> bool:
        """Train an assignment until it is finished or stopped, or fails on all ranks alike.

        Returns:
            Whether the group takes another assignment; the same on all ranks.

        Raises:
            Exception: Any error on this rank alone; Ray Train then restarts the group.
        """
        from csmae.training.checkpoint import FullDiskError
        from csmae.training.micro_batch import SmallerMicroBatchError
        from csmae.training.trainer import DivergedError, StoppedError

        try:
            if self._train_epochs(assignment) and self.rank == 0:
                self._end(assignment, Outcome.FINISHED)
        except StoppedError:
            ray.get(self.coordinator.preempted.remote(assignment.id, self.attempt))
            return False
        except DivergedError as error:
            if self.rank == 0:
                self._end(assignment, Outcome.FAILED, str(error))
        except FullDiskError as error:
            if self.rank == 0:
                self._end(assignment, Outcome.STORAGE_FAILED, str(error))
        except ConfigError as error:  # permanent; the other ranks may wait in a collective
            self._end(assignment, Outcome.FAILED, f"rank {self.rank}: {error}")
            raise
        except SmallerMicroBatchError as error:  # the other ranks wait in a collective: the group must restart
            ray.get(self.coordinator.shrink_micro_batch.remote(assignment.id, self.attempt, error.micro_batch))
            raise
        except Exception as error:
            text = f"{type(error).__name__} on rank {self.rank}: {' '.join(str(error).split())[:500]}"
            ray.get(self.coordinator.report_error.remote(assignment.id, self.attempt, text))
            raise
        return True

    def _train_epochs(self, assignment: Assignment) -> bool:
        """Train until the decision is to stop; returns whether all epochs are trained."""
        from csmae.training.micro_batch import save_micro_batch_limit

        with self._files(assignment) as (run_dir, mirror):
            if assignment.micro_batch:  # the rank that requested it may have noted it on another node's disk
                save_micro_batch_limit(run_dir, assignment.micro_batch)
            if self.rank == 0 and (saved := saved_epoch(run_dir)):
                ray.get(self.coordinator.report_saved.remote(assignment.id, self.attempt, *saved))
            for epoch in self._epochs(assignment, run_dir):
                mirror()
                metrics = epoch.metrics if self.rank == 0 else None
                if not ray.get(self.coordinator.report.remote(assignment.id, self.attempt, epoch.number, metrics)):
                    return False
        return True

    @contextmanager
    def _files(self, assignment: Assignment) -> Iterator[tuple[Path, Callable[[], object]]]:
        """The trial's folder on this node, and a function to call between epochs."""
        if self.spec.remote is None:
            yield Path(assignment.run_dir), lambda: None
            return
        remote = self.spec.remote.remote_folder(Path(assignment.run_dir))
        folder, fingerprint = working_copy_dir(remote, self.rank), config_fingerprint(assignment.config)
        heartbeat = partial(self._send_heartbeat, assignment)
        with working_copy(remote, folder, fingerprint, self.rank == 0, heartbeat) as copy:
            yield copy

    def _epochs(self, assignment: Assignment, run_dir: Path) -> Iterator[Any]:
        from ray.train.torch import get_device

        module, _, name = self.spec.pretrain.partition(":")
        pretrain: Callable[..., Iterator[Any]] = getattr(importlib.import_module(module), name)
        config = Config.model_validate(assignment.config)
        return pretrain(config, run_dir, str(get_device()), self._on_step(assignment))

    def _on_step(self, assignment: Assignment) -> Callable[[int, int], bool]:
        """Make the training's ``on_step``: it sends heartbeats, and returns whether a node of the group will be preempted."""
        is_preempted, last_heartbeat = preemption_check(), time.monotonic()

        def on_step(done: int, total: int) -> bool:
            nonlocal last_heartbeat
            if time.monotonic() - last_heartbeat > self.spec.hang_timeout_s / HEARTBEATS_PER_TIMEOUT:
                last_heartbeat = time.monotonic()
                self._send_heartbeat(assignment)
            return is_preempted()

        return on_step

    def _send_heartbeat(self, assignment: Assignment) -> None:
        self.coordinator.heartbeat.remote(assignment.id, self.attempt)

    def _end(self, assignment: Assignment, outcome: Outcome, reason: str = "") -> None:
        ray.get(self.coordinator.end.remote(assignment.id, self.attempt, outcome, reason))
