"""Warm worker groups: a slot's DDP workers start once and serve one trial after another."""

from __future__ import annotations

import gc
import importlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from csmae.config import Config, ConfigError
from csmae.tuning.file_set import Files
from csmae.tuning.group_events import GroupEvents
from csmae.tuning.mailbox import Assignment, EpochDone, Event, GroupLost, Holding, Mailbox, Outcome, Silence, TrialDone
from csmae.tuning.working_copy import clear_copies, copy_folder, marks_of, saved_epoch, working_copy

PRETRAIN = "csmae.training.engine:pretrain"

SLOT_RESOURCES = {"node:__internal_head__": 0.0001}
"""A slot's own processes wait most of the time. They sit on the head, without which nothing goes on anyway: a node that is
lost takes workers alone with it."""

GROUP_RESTARTS = 5
"""Worker deaths, beyond those that one trial may have, after which a slot gives up its ``fit()`` and begins a new one."""

RENEW_AFTER = 8
"""Compiled trials after which a group's processes make way for new ones: each trial leaves MiB of torch's behind."""

BEATS = 20
"""Signs of life within the time after which a silent worker is taken for dead."""

CLOSE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class SlotPlan:
    """What each slot of a search is made of."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    retries: int
    """Restarts of a trial after a worker died."""
    hang_timeout_s: float
    """Silence after which workers are taken for dead."""
    scratch_dir: str
    """Where Ray Train leaves its own notes."""
    files: Files | None = None
    """The bucket that holds the trials' files; None where their folder is shared."""
    accelerator_type: str | None = None
    """Of the workers' GPUs, where that matters."""
    pretrain: str = PRETRAIN
    """Module and name of the generator that trains."""

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker} | gpus

    @property
    def group_text(self) -> str:
        """The workers of a trial in words, such as ``2 x 1 CPU``."""
        return f"{self.workers} x " + " and ".join(f"{n:g} {name}" for name, n in self.worker_resources.items())


class Slot(tune.Trainable):  # type: ignore[misc]
    """A place where trials run one after another, in one long-lived ``TorchTrainer.fit()``.

    Tune keeps the slot's process for the next trial (``reuse_actors``); a step is an epoch, or the moment in which the
    workers get or lose their resources.
    """

    def setup(self, config: dict[str, Any], plan: SlotPlan) -> None:
        """Start the workers, with their first assignment waiting for them."""
        self._plan, self._closing = plan, False
        self._last: EpochDone | None = None  # the trial's last epoch, told to Tune together with the trial's end
        self._fits, self._ended = 0, 0
        self._mailbox = ray.remote(num_cpus=0)(Mailbox).remote(plan.retries, plan.hang_timeout_s)
        self._start()
        self._assign(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Hand the next trial to the same workers."""
        self._assign(config)
        return True

    def step(self) -> dict[str, Any]:
        """Let the workers go on and wait for the epoch they do.

        Returns:
            ``epoch`` and ``metrics`` as flat keys, or ``holding``: whether the workers hold resources; at the end
            ``done``, and the reason under the outcome's name.
        """
        event = self._next_event()
        if isinstance(event, EpochDone):
            self._losses = 0
            if event.number < self._config.train.epochs:
                return _result(event)
            self._last, event = event, self._next_event()
        if isinstance(event, Holding):
            return {"holding": event.resources}
        assert isinstance(event, TrialDone), "no epoch follows the last one"
        return {**(_result(self._last) if self._last else {}), event.outcome: event.reason, "done": True}

    def cleanup(self) -> None:
        """Send the workers home and wait until their reservation is free."""
        self._closing = True
        ray.get(self._mailbox.close.remote())
        self._thread.join(CLOSE_TIMEOUT_S)

    def _assign(self, config: dict[str, Any]) -> None:
        self._config, self._losses, self._last = Config.model_validate(config["config"]), 0, None
        ray.get(self._mailbox.assign.remote(config["config"], config["run_dir"]))
        if self._ended == self._fits:
            self._start()

    def _start(self) -> None:
        self._fits += 1
        self._thread = threading.Thread(target=self._fit, args=(self._fits,), daemon=True)
        self._thread.start()

    def _next_event(self) -> EpochDone | Holding | TrialDone:
        """What the workers tell next; silent ones are killed, and a group that is lost is replaced once an epoch."""
        while True:
            event: Event = ray.get(self._mailbox.next_event.remote())
            if isinstance(event, Silence):
                for worker in event.workers:
                    ray.kill(worker)  # Ray Train starts the group anew
            elif isinstance(event, GroupLost):
                if event.fit < self._fits:
                    continue  # its successor is at work already
                if event.roomless:
                    return TrialDone("roomless", f"no node has room for {self._plan.group_text}")
                self._losses += bool(event.reason)
                if self._losses > 1:
                    return TrialDone("failed", event.reason)
                self._start()
            else:
                return event

    def _fit(self, number: int) -> None:
        """The thread: one ``fit()`` for as long as its workers can be kept alive."""
        lost = GroupLost(number)
        try:
            events = GroupEvents(self._mailbox)
            make_trainer(serve, {"mailbox": self._mailbox, "plan": self._plan}, self._plan, events).fit()
        except Exception as error:  # whatever ended the group, the slot must hear of it, not this thread
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            roomless = isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)
            lost = GroupLost(number, reason, roomless)
        self._ended = number  # before the slot hears of it: an assignment in between starts the successor itself
        if not self._closing:
            ray.get(self._mailbox.group_lost.remote(lost))


def _result(event: EpochDone) -> dict[str, Any]:
    return {"epoch": event.number, "metrics": event.metrics}


def make_trainer(
    loop: Callable[[dict[str, Any]], None], config: dict[str, Any], plan: SlotPlan, events: GroupEvents | None = None
) -> TorchTrainer:
    """Ray Train's trainer for a loop that every worker of a slot runs; ``events`` hears of its resources."""
    return TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=train.ScalingConfig(
            num_workers=plan.workers,
            use_gpu=plan.gpus_per_worker > 0,
            resources_per_worker=plan.worker_resources,
            accelerator_type=plan.accelerator_type,
        ),
        run_config=train.RunConfig(
            name=f"slot-{uuid.uuid4().hex[:8]}",
            storage_path=plan.scratch_dir,
            callbacks=[events] if events else None,
            failure_config=train.FailureConfig(max_failures=plan.retries + GROUP_RESTARTS, controller_failure_limit=3),
        ),
    )


def serve(setting: dict[str, Any]) -> None:
    """What each worker does all its life: take an assignment, train it, take the next; or leave for another group to come."""
    import torch

    mailbox, plan = setting["mailbox"], setting["plan"]
    torch.set_num_threads(max(1, round(plan.cpus_per_worker)))
    group = broadcast_from_rank_zero(uuid.uuid4().hex)
    rank = _Rank(mailbox, group, train.get_context().get_world_rank(), plan)
    myself = ray.get_runtime_context().current_actor
    importlib.import_module(plan.pretrain.partition(":")[0])  # seconds, that no trial shall wait for
    done = compiled = 0
    while (assignment := ray.get(mailbox.take.remote(group, done, myself))) is not None:
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

    mailbox: Any
    group: str
    number: int
    plan: SlotPlan

    def train(self, assignment: Assignment) -> bool:
        """Train one assignment until it is done, stopped or failed on all ranks alike.

        Returns:
            Whether the group stays for the next; on all ranks alike.

        Raises:
            Exception: Whatever went wrong on this rank alone; Ray Train then starts the group anew.
        """
        from csmae.training.checkpoint import FullDiskError
        from csmae.training.engine import DivergedError, StoppedError
        from csmae.training.memory import SmallerMicroBatchError

        try:
            if self._epochs(assignment) and self.number == 0:
                self._end(assignment, "finished")
        except StoppedError:
            ray.get(self.mailbox.leave.remote(assignment.ticket, self.group))
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
            ray.get(self.mailbox.shrink.remote(assignment.ticket, self.group, error.micro_batch))
            raise
        except Exception as error:
            text = f"{type(error).__name__} on rank {self.number}: {' '.join(str(error).split())[:500]}"
            ray.get(self.mailbox.complain.remote(assignment.ticket, self.group, text))
            raise
        return True

    def _epochs(self, assignment: Assignment) -> bool:
        """Train as long as the verdict allows; returns whether the training came to its end."""
        from csmae.training.memory import note_micro_batch

        first = self.number == 0
        with self._files(assignment) as (run_dir, mirror):
            if assignment.micro_batch:  # the rank that asked for it may have noted it in a folder of its own
                note_micro_batch(run_dir, assignment.micro_batch)
            if first and (saved := saved_epoch(run_dir)):
                ray.get(self.mailbox.replay.remote(assignment.ticket, self.group, *saved))
            for epoch in self._generator(assignment, run_dir):
                mirror()
                metrics = epoch.metrics if first else None
                if not ray.get(self.mailbox.tell.remote(assignment.ticket, self.group, epoch.number, metrics)):
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
            self.mailbox.beat.remote(assignment.ticket, self.group)

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
                self.mailbox.beat.remote(ticket, self.group)
            return notice.preemption_info is not None

        return beat

    def _end(self, assignment: Assignment, outcome: Outcome, reason: str = "") -> None:
        ray.get(self.mailbox.end.remote(assignment.ticket, self.group, outcome, reason))


def _nothing() -> None:
    """What is to be done between epochs where the storage is a folder."""
