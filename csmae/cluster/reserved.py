"""Runs functions in parallel on reserved resources of Ray's nodes, and gives up when these are not available."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
    remote, groups = ray.remote(function), dict[Any, PlacementGroup]()
    try:
        for arguments in calls:
            group = placement_group([dict(resources)])
            task = remote.options(
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            )
            groups[task.remote(*arguments)] = group
        returned = _wait(groups, resources)
        return [returned[result] for result in groups]
    finally:
        for result, group in groups.items():
            ray.cancel(result, force=True)
            remove_placement_group(group)


def _wait(groups: Mapping[Any, PlacementGroup], resources: Mapping[str, float]) -> dict[Any, Any]:
    """Wait until all calls have returned, and free the resources of each that has.

    Args:
        groups: By the reference to a call's result, its placement group.
        resources: Of each call.

    Returns:
        What each call returned, by its reference.

    Raises:
        NoResourcesError: No call had its resources for ``RESOURCE_TIMEOUT_S``.
        RayError: A call failed.
    """
    pending, returned, scheduled_at = dict(groups), dict[Any, Any](), time.monotonic()
    while pending:
        done, _ = ray.wait(list(pending), timeout=POLL_INTERVAL_S)
        for result in done:
            remove_placement_group(pending.pop(result))
            returned[result] = ray.get(result)
        if done or any(placement_group_table(group)["state"] == "CREATED" for group in pending.values()):
            scheduled_at = time.monotonic()
        elif time.monotonic() - scheduled_at > RESOURCE_TIMEOUT_S:
            requested = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
            raise NoResourcesError(f"no node had {requested} free for {RESOURCE_TIMEOUT_S:.0f} s")
    return returned
