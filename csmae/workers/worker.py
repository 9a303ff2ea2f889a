"""The part of a worker group that trains: one process per rank."""

from __future__ import annotations

import gc
import pkgutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from csmae.cluster.ray_private import preemption_check
from csmae.config import Config, ConfigError, one_line
from csmae.training.checkpoint import FullDiskError, config_fingerprint
from csmae.training.micro_batch import SmallerMicroBatchError, save_micro_batch_limit
from csmae.workers.messages import Assignment, Outcome
from csmae.workers.spec import WorkerGroupSpec
from csmae.workers.trial_files import PARENT, saved_epoch, working_copy
from csmae.workers.working_copies import remove_stale_copies, working_copy_dir

MAX_COMPILED_TRIALS = 8
"""Compiled trials after which a group's processes are replaced: torch keeps memory of each one."""

HEARTBEATS_PER_TIMEOUT = 20
"""Heartbeats that a worker sends within the hang timeout."""


def train_loop(config: dict[str, Any]) -> None:
    """Train one assignment after another until the coordinator closes, or the group must be replaced.

    Process: every train worker; Ray Train calls it with the group's ``coordinator`` and ``spec``.
    """
    coordinator, spec = config["coordinator"], config["spec"]
    torch.set_num_threads(max(1, round(spec.allocation.cpus_per_worker)))
    attempt = broadcast_from_rank_zero(uuid.uuid4().hex)
    rank, actor = train.get_context().get_world_rank(), ray.get_runtime_context().current_actor
    pkgutil.resolve_name(spec.pretrain)  # takes seconds: before the first trial arrives
    last_id = num_compiled = 0
    while (assignment := ray.get(coordinator.next_assignment.remote(attempt, last_id, actor))) is not None:
        ready = AssignmentRun(coordinator, attempt, rank, spec, assignment).train()
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
class AssignmentRun:
    """One rank's training of one assignment. Process: its train worker."""

    coordinator: Any
    attempt: str
    """Id that all ranks share until Ray Train restarts them."""
    rank: int
    spec: WorkerGroupSpec
    assignment: Assignment

    def train(self) -> bool:
        """Train until the assignment is finished, paused or stopped, or fails on all ranks alike.

        Returns:
            Whether the group takes another assignment; the same on all ranks.

        Raises:
            Exception: Any error on this rank alone; Ray Train then restarts the group.
        """
        from csmae.training.trainer import DivergedError, StoppedError  # importing timm takes seconds

        try:
            if self._train_epochs() and self.rank == 0:
                self._call(self.coordinator.end, self.assignment.outcome)
        except StoppedError:
            self._call(self.coordinator.preempted)
            return False
        except DivergedError as error:
            if self.rank == 0:
                self._call(self.coordinator.end, Outcome.FAILED, str(error))
        except FullDiskError as error:
            if self.rank == 0:
                self._call(self.coordinator.end, Outcome.STORAGE_FAILED, str(error))
        except ConfigError as error:  # permanent; the other ranks may wait in a collective
            self._call(self.coordinator.end, Outcome.FAILED, f"rank {self.rank}: {error}")
            raise
        except SmallerMicroBatchError as error:  # the other ranks wait in a collective: the group must restart
            self._call(self.coordinator.shrink_micro_batch, error.micro_batch)
            raise
        except Exception as error:
            text = f"{type(error).__name__} on rank {self.rank}: {one_line(error, 500)}"
            self._call(self.coordinator.report_error, text)
            raise
        return True

    def _call(self, method: Any, *arguments: Any) -> Any:
        """Call a method of the coordinator about the assignment, and wait for its result."""
        return ray.get(method.remote(self.assignment.id, self.attempt, *arguments))

    def _train_epochs(self) -> bool:
        """Train until the decision is to stop; returns whether all epochs of the assignment are trained and stored."""
        with self._files() as (run_dir, mirror):
            if self.assignment.micro_batch:  # the rank that requested it may have noted it on another node's disk
                save_micro_batch_limit(run_dir, self.assignment.micro_batch)
            if self.rank == 0 and (saved := saved_epoch(run_dir)):
                self._call(self.coordinator.report_saved, *saved)
            for epoch in self._epochs(run_dir):
                mirror()
                if not self._call(self.coordinator.report, epoch.number, epoch.metrics if self.rank == 0 else None):
                    return False
        return True

    def _files(self) -> AbstractContextManager[tuple[Path, Callable[[], object]]]:
        """The trial's folder on this node, and a function to call between epochs."""
        run_dir = Path(self.assignment.run_dir)
        if self.spec.remote is None:
            return nullcontext((run_dir, lambda: None))
        remote, parent = self.spec.remote.remote_folder(run_dir), None
        if self.assignment.parent_dir:
            parent = self.spec.remote.remote_folder(Path(self.assignment.parent_dir))
        folder, fingerprint = working_copy_dir(remote, self.rank), config_fingerprint(self.assignment.config)
        return working_copy(remote, folder, fingerprint, self.rank == 0, self._send_heartbeat, parent)

    def _epochs(self, run_dir: Path) -> Iterator[Any]:
        pretrain: Callable[..., Iterator[Any]] = pkgutil.resolve_name(self.spec.pretrain)
        config, parent_dir = Config.model_validate(self.assignment.config), None
        if self.assignment.parent_dir:
            parent_dir = run_dir / PARENT if self.spec.remote else Path(self.assignment.parent_dir)
        return pretrain(config, run_dir, str(get_device()), self._on_step(), self.assignment.until, parent_dir)

    def _on_step(self) -> Callable[[int, int], bool]:
        """Make the training's ``on_step``: it sends heartbeats, and returns whether a node of the group will be preempted."""
        is_preempted, last_heartbeat = preemption_check(), time.monotonic()

        def on_step(done: int, total: int) -> bool:
            nonlocal last_heartbeat
            if time.monotonic() - last_heartbeat > self.spec.hang_timeout_s / HEARTBEATS_PER_TIMEOUT:
                last_heartbeat = time.monotonic()
                self._send_heartbeat()
            return is_preempted()

        return on_step

    def _send_heartbeat(self) -> None:
        self.coordinator.heartbeat.remote(self.assignment.id, self.attempt)
