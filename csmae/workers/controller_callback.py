"""What Ray Train's controller tells the mailbox of its worker group: when the workers hold resources, and who they are."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback


class ControllerCallback(WorkerGroupCallback):  # type: ignore[misc]
    """Called in the controller's process, before the workers join their process group; never waits for an answer.

    Args:
        mailbox: Of the slot.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """The controller asks Ray for resources: it holds none."""
        self._coordinator.workers_stopped.remote()

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """The workers' processes run on their resources."""
        self._coordinator.workers_started.remote([worker.actor for worker in workers])
        return {}

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """The resources are free again."""
        self._coordinator.workers_stopped.remote()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        """The resources are free again."""
        self._coordinator.workers_stopped.remote()
