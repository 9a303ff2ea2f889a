"""The part of a worker group that Ray Tune drives: train workers that start once and train one trial after another."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
from ray import train, tune
from ray.train.torch import TorchTrainer

from csmae.cluster.ray_private import is_startup_timeout
from csmae.config import one_line
from csmae.workers.controller_callback import ControllerCallback
from csmae.workers.coordinator import Coordinator
from csmae.workers.messages import (
    AssignmentEnded,
    CoordinatorEvent,
    EpochReport,
    FitEnded,
    HeartbeatTimeout,
    Outcome,
    ResourcesHeld,
)
from csmae.workers.spec import WorkerGroupSpec
from csmae.workers.worker import train_loop

TRAINABLE_RESOURCES = {"node:__internal_head__": 0.0001}
"""Places a group's trainable on the head node: it is idle most of the time, and a search ends with the head anyway. Losing any
other node loses only its workers."""

GROUP_RESTARTS = 5
"""Restarts of the workers that one ``fit()`` allows beyond a trial's retries; then a new ``fit()`` starts."""

CLOSE_TIMEOUT_S = 20.0


class WorkerGroupTrainable(tune.Trainable):  # type: ignore[misc]
    """Trains trials one after another with the workers of one long-lived ``TorchTrainer.fit()``.

    Process: an actor on the head node, started by Tune and reused for the next trial (``reuse_actors``). A Tune step is an epoch,
    or a change of whether the workers hold resources.
    """

    def setup(self, config: dict[str, Any], spec: WorkerGroupSpec) -> None:
        """Start the coordinator and the workers, and assign the first trial."""
        self._spec, self._closing = spec, False
        self._last_epoch: dict[str, Any] = {}
        """The result of the trial's last epoch, which Tune gets together with the trial's end."""
        self._num_fits, self._last_ended_fit = 0, 0
        self._coordinator = ray.remote(num_cpus=0)(Coordinator).remote(spec.retries, spec.hang_timeout_s)
        self._start_fit()
        self._assign(config)

    def reset_config(self, config: dict[str, Any]) -> bool:
        """Assign the next trial to the same workers."""
        self._assign(config)
        return True

    def step(self) -> dict[str, Any]:
        """Let the workers continue, and wait for the next event of the trial.

        Returns:
            ``epoch`` and ``metrics``; or ``resources_held``, whether the workers hold resources; when the trial
            ends or pauses ``done``, and the reason under the name of the ``Outcome``, together with the last epoch.
        """
        event = self._next_event()
        if isinstance(event, EpochReport):
            self._failed_fits = 0
            if event.epoch < self._until:
                return asdict(event)
            self._last_epoch, event = asdict(event), self._next_event()
        if isinstance(event, ResourcesHeld):
            return {"resources_held": event.held}
        assert isinstance(event, AssignmentEnded), "no epoch follows the last one"
        return {**self._last_epoch, event.outcome.value: event.reason, "done": True}

    def cleanup(self) -> None:
        """Stop the workers and wait until their resources are free."""
        self._closing = True
        ray.get(self._coordinator.close.remote())
        self._fit_thread.join(CLOSE_TIMEOUT_S)

    def _assign(self, config: dict[str, Any]) -> None:
        epochs = config["config"]["train"]["epochs"]
        self._until, self._failed_fits, self._last_epoch = min(config.get("until") or epochs, epochs), 0, {}
        assignment = config["config"], config["run_dir"], self._until, config.get("parent_dir")
        ray.get(self._coordinator.assign.remote(*assignment))
        if self._last_ended_fit == self._num_fits:
            self._start_fit()

    def _start_fit(self) -> None:
        self._num_fits += 1
        self._fit_thread = threading.Thread(target=self._fit, args=(self._num_fits,), daemon=True)
        self._fit_thread.start()

    def _next_event(self) -> EpochReport | ResourcesHeld | AssignmentEnded:
        """Wait for the next event of the trial.

        Meanwhile kill workers whose heartbeat timed out, and replace a ``fit()`` that failed, once per epoch.
        """
        while True:
            event: CoordinatorEvent = ray.get(self._coordinator.next_event.remote())
            if isinstance(event, HeartbeatTimeout):
                for worker in event.workers:
                    ray.kill(worker)  # Ray Train then restarts all workers
            elif isinstance(event, FitEnded):
                if event.number < self._num_fits:
                    continue  # its successor runs already
                if event.unschedulable:
                    reason = f"no node has the resources for {self._spec.allocation}"
                    return AssignmentEnded(Outcome.UNSCHEDULABLE, reason)
                self._failed_fits += bool(event.reason)
                if self._failed_fits > 1:
                    return AssignmentEnded(Outcome.FAILED, event.reason)
                self._start_fit()
            else:
                return event

    def _fit(self, number: int) -> None:
        """Run one ``fit()``, in a thread, and tell the coordinator when it ends by itself."""
        ended = FitEnded(number)
        try:
            config = {"coordinator": self._coordinator, "spec": self._spec}
            make_trainer(train_loop, config, self._spec, ControllerCallback(self._coordinator)).fit()
        except Exception as error:  # any error must reach the trial; in this thread it would be lost
            reason = f"{type(error).__name__}: {one_line(error, 500)}"
            ended = FitEnded(number, reason, unschedulable=is_startup_timeout(error))
        # Before the coordinator knows: an assignment in between starts the successor itself.
        self._last_ended_fit = number
        if not self._closing:
            ray.get(self._coordinator.fit_ended.remote(ended))


def make_trainer(
    train_loop: Callable[[dict[str, Any]], None],
    train_loop_config: dict[str, Any],
    spec: WorkerGroupSpec,
    callback: ControllerCallback | None = None,
) -> TorchTrainer:
    """Make Ray Train's trainer for a group's workers; the controller calls ``callback``."""
    return TorchTrainer(
        train_loop,
        train_loop_config=train_loop_config,
        scaling_config=train.ScalingConfig(
            num_workers=spec.allocation.workers_per_trial,
            use_gpu=spec.allocation.gpus_per_worker > 0,
            resources_per_worker=spec.allocation.worker_resources,
            accelerator_type=spec.allocation.accelerator_type,
        ),
        run_config=train.RunConfig(
            name=f"worker-group-{uuid.uuid4().hex[:8]}",
            storage_path=spec.scratch_dir,
            callbacks=[callback] if callback else None,
            failure_config=train.FailureConfig(max_failures=spec.retries + GROUP_RESTARTS, controller_failure_limit=3),
        ),
    )
