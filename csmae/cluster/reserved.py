"""Functions that run side by side on resources of Ray's nodes, and wait for these only so long."""

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

WAIT_S = 300.0
"""Without resources for any of the functions, after which they are taken to be gone."""

LOOK_EVERY_S = 1.0


class NoResourcesError(RuntimeError):
    """The nodes had none of what was asked for, for too long."""


@dataclass(frozen=True)
class _Task:
    index: int
    group: PlacementGroup
    result: Any

    def holds(self) -> bool:
        """Whether its resources are reserved at the moment."""
        return bool(placement_group_table(self.group)["state"] == "CREATED")

    def end(self) -> None:
        """Stop it, if it has not ended, and free its resources."""
        ray.cancel(self.result, force=True)
        remove_placement_group(self.group)


def run_reserved(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], resources: Mapping[str, float]
) -> list[Any]:
    """Call a function in a process of its own for each tuple of arguments; the results are in their order.

    Args:
        function: To call.
        calls: Arguments.
        resources: Of each call, such as ``{"CPU": 4.0, "GPU": 1.0}``.

    Raises:
        NoResourcesError: None of the calls held its resources for ``WAIT_S``.
        RayError: A call failed.
    """
    remote, tasks = ray.remote(function), list[_Task]()
    try:
        for index, arguments in enumerate(calls):
            tasks.append(_start(index, remote, arguments, resources))
        return [result for _, result in sorted(_results(tasks, resources), key=lambda it: it[0])]
    finally:
        for task in tasks:
            task.end()


def _start(index: int, remote: Any, arguments: tuple[Any, ...], resources: Mapping[str, float]) -> _Task:
    group = placement_group([dict(resources)])
    task = remote.options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    return _Task(index, group, task.remote(*arguments))


def _results(tasks: list[_Task], resources: Mapping[str, float]) -> Iterator[tuple[int, Any]]:
    open_, held_at = {task.result: task for task in tasks}, time.monotonic()
    while open_:
        done, _ = ray.wait(list(open_), timeout=LOOK_EVERY_S)
        for result in done:
            task = open_.pop(result)
            remove_placement_group(task.group)
            yield task.index, ray.get(result)
        if done or any(task.holds() for task in open_.values()):
            held_at = time.monotonic()
        elif time.monotonic() - held_at > WAIT_S:
            wanted = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
            raise NoResourcesError(f"no node had {wanted} free for {WAIT_S:.0f} s")
