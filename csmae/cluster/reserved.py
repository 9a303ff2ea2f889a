"""Runs functions in parallel on reserved resources of Ray's nodes, and gives up when these are not available."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

RESOURCE_TIMEOUT_S = 300.0
"""Time without resources for any call after which they are considered gone."""

POLL_INTERVAL_S = 1.0


class NoResourcesError(RuntimeError):
    """No node had the requested resources in time."""


@dataclass(frozen=True)
class _Task:
    index: int
    group: PlacementGroup
    result: Any

    def is_scheduled(self) -> bool:
        """Whether its resources are reserved now."""
        return bool(placement_group_table(self.group)["state"] == "CREATED")

    def cancel(self) -> None:
        """Stop the call if it still runs, and free its resources."""
        ray.cancel(self.result, force=True)
        remove_placement_group(self.group)


def run_reserved(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], resources: Mapping[str, float]
) -> list[Any]:
    """Call a function once for each tuple of arguments, each in a process of its own; returns the results in their order.

    Args:
        function: Runs in Ray's workers.
        calls: Arguments of each call.
        resources: Reserved for each call, such as ``{"CPU": 4.0, "GPU": 1.0}``.

    Raises:
        NoResourcesError: No call had its resources for ``RESOURCE_TIMEOUT_S``.
        RayError: A call failed.
    """
    remote, tasks = ray.remote(function), list[_Task]()
    try:
        for index, arguments in enumerate(calls):
            tasks.append(_start(index, remote, arguments, resources))
        return [result for _, result in sorted(_results(tasks, resources), key=lambda it: it[0])]
    finally:
        for task in tasks:
            task.cancel()


def _start(index: int, remote: Any, arguments: tuple[Any, ...], resources: Mapping[str, float]) -> _Task:
    group = placement_group([dict(resources)])
    task = remote.options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    return _Task(index, group, task.remote(*arguments))


def _results(tasks: list[_Task], resources: Mapping[str, float]) -> Iterator[tuple[int, Any]]:
    pending, scheduled_at = {task.result: task for task in tasks}, time.monotonic()
    while pending:
        done, _ = ray.wait(list(pending), timeout=POLL_INTERVAL_S)
        for result in done:
            task = pending.pop(result)
            remove_placement_group(task.group)
            yield task.index, ray.get(result)
        if done or any(task.is_scheduled() for task in pending.values()):
            scheduled_at = time.monotonic()
        elif time.monotonic() - scheduled_at > RESOURCE_TIMEOUT_S:
            requested = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
            raise NoResourcesError(f"no node had {requested} free for {RESOURCE_TIMEOUT_S:.0f} s")
