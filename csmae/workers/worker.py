"""One train worker: takes assignments from its coordinator, trains them and reports every epoch."""

from __future__ import annotations

import gc
import importlib
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.collective import broadcast_from_rank_zero

from csmae.config import Config, ConfigError
from csmae.workers.messages import Assignment, Outcome
from csmae.workers.spec import WorkerGroupSpec
from csmae.workers.trial_files import clear_copies, copy_folder, marks_of, saved_epoch, working_copy

RENEW_AFTER = 8
"""Compiled trials after which a group's processes make way for new ones: each trial leaves MiB of torch's behind."""


BEATS = 20
"""Signs of life within the time after which a silent worker is taken for dead."""


def serve(setting: dict[str, Any]) -> None:
    """What each worker does all its life: take an assignment, train it, take the next; or leave for another group to come."""
    import torch

    coordinator, plan = setting["mailbox"], setting["plan"]
    torch.set_num_threads(max(1, round(plan.cpus_per_worker)))
    group = broadcast_from_rank_zero(uuid.uuid4().hex)
    rank = _Rank(coordinator, group, train.get_context().get_world_rank(), plan)
    myself = ray.get_runtime_context().current_actor
    importlib.import_module(plan.pretrain.partition(":")[0])  # seconds, that no trial shall wait for
    done = compiled = 0
    while (assignment := ray.get(coordinator.next_assignment.remote(group, done, myself))) is not None:
        stays = rank.train(assignment)
        compiled += assignment.config["train"]["compile"]
        if not stays or compiled == RENEW_AFTER:
            return
        done = assignment.ticket
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if plan.files:
        clear_copies()


@dataclass(frozen=True)
class _Rank:
    """One worker of a group."""

    coordinator: Any
    group: str
    number: int
    plan: WorkerGroupSpec

    def train(self, assignment: Assignment) -> bool:
        """Train one assignment until it is done, stopped or failed on all ranks alike.

        Returns:
            Whether the group stays for the next; on all ranks alike.

        Raises:
            Exception: Whatever went wrong on this rank alone; Ray Train then starts the group anew.
        """
        from csmae.training.checkpoint import FullDiskError
        from csmae.training.micro_batch import SmallerMicroBatchError
        from csmae.training.trainer import DivergedError, StoppedError

        try:
            if self._epochs(assignment) and self.number == 0:
                self._end(assignment, "finished")
        except StoppedError:
            ray.get(self.coordinator.preempted.remote(assignment.ticket, self.group))
            return False
        except DivergedError as error:
            if self.number == 0:
                self._end(assignment, "failed", str(error))
        except FullDiskError as error:
            if self.number == 0:
                self._end(assignment, "stuck", str(error))
        except ConfigError as error:  # no attempt would cure it; the other ranks may wait in a collective
            self._end(assignment, "failed", f"rank {self.number}: {error}")
            raise
        except SmallerMicroBatchError as error:  # the other ranks wait in a collective: the group must go
            ray.get(self.coordinator.shrink_micro_batch.remote(assignment.ticket, self.group, error.micro_batch))
            raise
        except Exception as error:
            text = f"{type(error).__name__} on rank {self.number}: {' '.join(str(error).split())[:500]}"
            ray.get(self.coordinator.report_error.remote(assignment.ticket, self.group, text))
            raise
        return True

    def _epochs(self, assignment: Assignment) -> bool:
        """Train as long as the verdict allows; returns whether the training came to its end."""
        from csmae.training.micro_batch import note_micro_batch

        first = self.number == 0
        with self._files(assignment) as (run_dir, mirror):
            if assignment.micro_batch:  # the rank that asked for it may have noted it in a folder of its own
                note_micro_batch(run_dir, assignment.micro_batch)
            if first and (saved := saved_epoch(run_dir)):
                ray.get(self.coordinator.report_again.remote(assignment.ticket, self.group, *saved))
            for epoch in self._generator(assignment, run_dir):
                mirror()
                metrics = epoch.metrics if first else None
                if not ray.get(self.coordinator.report.remote(assignment.ticket, self.group, epoch.number, metrics)):
                    return False
        return True

    @contextmanager
    def _files(self, assignment: Assignment) -> Iterator[tuple[Path, Callable[[], object]]]:
        """The trial's folder as this rank sees it, and what to call between epochs."""
        if self.plan.files is None:
            yield Path(assignment.run_dir), _nothing
            return
        files = self.plan.files.of(Path(assignment.run_dir))
        folder = copy_folder(files, self.number)

        def beat() -> None:
            self.coordinator.heartbeat.remote(assignment.ticket, self.group)

        with working_copy(files, folder, marks_of(assignment.config), self.number == 0, beat) as copy:
            yield copy

    def _generator(self, assignment: Assignment, run_dir: Path) -> Iterator[Any]:
        from ray.train.torch import get_device

        module, _, name = self.plan.pretrain.partition(":")
        pretrain: Callable[..., Iterator[Any]] = getattr(importlib.import_module(module), name)
        config = Config.model_validate(assignment.config)
        return pretrain(config, run_dir, str(get_device()), self._beats(assignment.ticket))

    def _beats(self, ticket: int) -> Callable[[int, int], bool]:
        """What the training calls after each step: a sign of life now and then; whether a node of the group will go."""
        from ray.train.v2._internal.execution.context import get_train_context  # the public form is a collective

        notice, last = get_train_context().preemption_context, time.monotonic()

        def beat(done: int, total: int) -> bool:
            nonlocal last
            if time.monotonic() - last > self.plan.hang_timeout_s / BEATS:
                last = time.monotonic()
                self.coordinator.heartbeat.remote(ticket, self.group)
            return notice.preemption_info is not None

        return beat

    def _end(self, assignment: Assignment, outcome: Outcome, reason: str = "") -> None:
        ray.get(self.coordinator.finish.remote(assignment.ticket, self.group, outcome, reason))


def _nothing() -> None:
    """What is to be done between epochs where the storage is a folder."""
