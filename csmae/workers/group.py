"""Warm worker groups: a slot's DDP workers start once and serve one trial after another."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray import train, tune
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from csmae.config import Config
from csmae.workers.controller_callback import ControllerCallback
from csmae.workers.coordinator import Coordinator
from csmae.workers.messages import AssignmentDone, EpochReport, Event, GroupLost, HeartbeatTimeout, ResourcesHeld
from csmae.workers.spec import WorkerGroupSpec
from csmae.workers.worker import serve

TRAINABLE_RESOURCES = {"node:__internal_head__": 0.0001}
"""A slot's own processes wait most of the time. They sit on the head, without which nothing goes on anyway: a node that is
lost takes workers alone with it."""

GROUP_RESTARTS = 5
"""Worker deaths, beyond those that one trial may have, after which a slot gives up its ``fit()`` and begins a new one."""


CLOSE_TIMEOUT_S = 20.0


class WorkerGroupTrainable(tune.Trainable):  # type: ignore[misc]
    """A place where trials run one after another, in one long-lived ``TorchTrainer.fit()``.

    Tune keeps the slot's process for the next trial (``reuse_actors``); a step is an epoch, or the moment in which the
    workers get or lose their resources.
    """

    def setup(self, config: dict[str, Any], plan: WorkerGroupSpec) -> None:
        """Start the workers, with their first assignment waiting for them."""
        self._plan, self._closing = plan, False
        self._last: EpochReport | None = None  # the trial's last epoch, told to Tune together with the trial's end
        self._fits, self._ended = 0, 0
        self._coordinator = ray.remote(num_cpus=0)(Coordinator).remote(plan.retries, plan.hang_timeout_s)
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
        if isinstance(event, EpochReport):
            self._losses = 0
            if event.number < self._config.train.epochs:
                return _result(event)
            self._last, event = event, self._next_event()
        if isinstance(event, ResourcesHeld):
            return {"holding": event.resources}
        assert isinstance(event, AssignmentDone), "no epoch follows the last one"
        return {**(_result(self._last) if self._last else {}), event.outcome: event.reason, "done": True}

    def cleanup(self) -> None:
        """Send the workers home and wait until their reservation is free."""
        self._closing = True
        ray.get(self._coordinator.close.remote())
        self._thread.join(CLOSE_TIMEOUT_S)

    def _assign(self, config: dict[str, Any]) -> None:
        self._config, self._losses, self._last = Config.model_validate(config["config"]), 0, None
        ray.get(self._coordinator.assign.remote(config["config"], config["run_dir"]))
        if self._ended == self._fits:
            self._start()

    def _start(self) -> None:
        self._fits += 1
        self._thread = threading.Thread(target=self._fit, args=(self._fits,), daemon=True)
        self._thread.start()

    def _next_event(self) -> EpochReport | ResourcesHeld | AssignmentDone:
        """What the workers tell next; silent ones are killed, and a group that is lost is replaced once an epoch."""
        while True:
            event: Event = ray.get(self._coordinator.next_event.remote())
            if isinstance(event, HeartbeatTimeout):
                for worker in event.workers:
                    ray.kill(worker)  # Ray Train starts the group anew
            elif isinstance(event, GroupLost):
                if event.fit < self._fits:
                    continue  # its successor is at work already
                if event.unschedulable:
                    return AssignmentDone("roomless", f"no node has room for {self._plan.group_text}")
                self._losses += bool(event.reason)
                if self._losses > 1:
                    return AssignmentDone("failed", event.reason)
                self._start()
            else:
                return event

    def _fit(self, number: int) -> None:
        """The thread: one ``fit()`` for as long as its workers can be kept alive."""
        lost = GroupLost(number)
        try:
            events = ControllerCallback(self._coordinator)
            make_trainer(serve, {"mailbox": self._coordinator, "plan": self._plan}, self._plan, events).fit()
        except Exception as error:  # whatever ended the group, the slot must hear of it, not this thread
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            unschedulable = isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)
            lost = GroupLost(number, reason, unschedulable)
        self._ended = number  # before the slot hears of it: an assignment in between starts the successor itself
        if not self._closing:
            ray.get(self._coordinator.fit_ended.remote(lost))


def _result(event: EpochReport) -> dict[str, Any]:
    return {"epoch": event.number, "metrics": event.metrics}


def make_trainer(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    plan: WorkerGroupSpec,
    events: ControllerCallback | None = None,
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
