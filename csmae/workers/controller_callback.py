"""The part of a worker group that lives in Ray Train's controller."""

from __future__ import annotations

from typing import Any

from csmae.cluster.ray_private import worker_group_callback_class


class ControllerCallback(worker_group_callback_class()):  # type: ignore[misc]
    """Informs the coordinator when the train workers hold resources, and which actors they are.

    Process: Ray Train's controller actor, which calls it before the workers join their process group. It never waits for the
    coordinator.

    Args:
        coordinator: Actor of the worker group.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def _report_no_resources(self, worker_group_context: Any) -> None:
        """The controller requests resources and holds none yet, or they are free again."""
        self._coordinator.workers_stopped.remote()

    before_worker_group_start = after_worker_group_shutdown = after_worker_group_abort = _report_no_resources

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """The workers' processes run and hold their resources."""
        self._coordinator.workers_started.remote([worker.actor for worker in workers])
        return {}
