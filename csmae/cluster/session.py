"""Ray for a search: a quiet one of our own on this machine, or a cluster that is there; and what fits on it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import ray
from ray._private.state import state

from csmae.cluster.auth import ensure_token, enter, find
from csmae.cluster.orphans import freeing_orphans
from csmae.cluster.temp_dir import ray_temp_dir
from csmae.config import ConfigError
from csmae.cpus import usable_cpus
from csmae.engine_logs import quiet_ray
from csmae.study.options import Search

OBJECT_STORE_BYTES = 256 * 2**20
"""Enough for what a search puts there: nothing of size passes through Ray."""

ACCELERATOR = "accelerator_type:"
"""How Ray calls the resource of a node that has a type of accelerator."""

KIND_UNIT = 0.001
"""Of such a resource that is asked for, so that a node of the type is chosen."""

UNIT = 10_000
"""Ray counts resources in ten-thousandths."""

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output cannot be silenced
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative data.path means the same in every process
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # how soon a dead worker is noticed
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",  # max_concurrent that start at a time; the searcher knows how many there may be
    "TUNE_GLOBAL_CHECKPOINT_S": "31536000",  # Tune's own snapshots are not used, and grow with the trials
}

OWN_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away from itself
    "OMP_NUM_THREADS": "1",  # each worker sets its own number of threads
}


@dataclass(frozen=True)
class ClusterResources:
    """CPUs and GPUs that a search may use."""

    cpus: float
    gpus: float
    where: str
    cpus_per_gpu: float | None = None
    """The fewest CPUs that a node has for each of its GPUs; None where all is one node."""
    requires_token: bool = True
    """Whether strangers are kept out."""
    kinds: Mapping[str, ClusterResources] = field(default_factory=dict)
    """By Ray's type of accelerator, what the nodes have that bear it."""
    nodes: tuple[tuple[float, float], ...] = ()
    """CPUs and GPUs of each node; empty where all is one node."""


@dataclass(frozen=True)
class Allocation:
    """What fits: how many trials at a time, and what each of their workers gets."""

    max_concurrent: int
    cpus_per_worker: float
    gpus_per_worker: float
    accelerator_type: str | None = None


def local_resources() -> ClusterResources:
    """What this machine has, as this process may use it."""
    import torch

    return ClusterResources(usable_cpus(), torch.cuda.device_count(), "this machine")


def allocate(search: Search, resources: ClusterResources) -> Allocation:
    """Divide the resources among trials of ``workers_per_trial`` workers.

    Raises:
        ConfigError: Not even one trial fits, or workers of one trial would share a GPU.
    """
    workers, kind = search.workers_per_trial, search.accelerator_type
    if kind:
        if kind not in resources.kinds:
            found = ", ".join(sorted(resources.kinds)) or "none that Ray knows"
            raise ConfigError(
                f"search.accelerator_type {kind}: the accelerators of {resources.where} are: {found}: name one of them, or none"
            )
        resources = resources.kinds[kind]
    gpus = search.gpus_per_worker if search.gpus_per_worker is not None else float(resources.gpus > 0)
    _check_gpus(gpus, workers)
    needs = [("CPUs", 1.0, resources.cpus)] + ([("GPUs", gpus, resources.gpus)] if gpus else [])
    for name, each, there in needs:
        if workers * _exact(each) > _exact(there):
            raise ConfigError(
                f"search.workers_per_trial {workers} needs {workers * each:g} {name}, {resources.where} has {there:g}: "
                "lower --workers-per-trial or --gpus-per-worker"
            )
    cpus = _cpus_per_worker(gpus, resources)
    fitting = sum(_workers_on(node, cpus, gpus) for node in resources.nodes or ((resources.cpus, resources.gpus),))
    if fitting < workers:
        takes = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        raise ConfigError(
            f"search.workers_per_trial {workers} needs {workers} x {takes}, each worker on one node; the nodes of {resources.where} "
            f"hold {fitting} such workers: lower --workers-per-trial or --gpus-per-worker"
        )
    return Allocation(min(fitting // workers, search.num_trials), cpus, gpus, kind)


def _check_gpus(gpus: float, workers: int) -> None:
    if 0 < gpus < 1 and workers > 1:
        raise ConfigError(
            f"search.gpus_per_worker must be whole where a trial has {workers} workers: found {gpus:g}; "
            "two workers of one trial cannot share a GPU: set --gpus-per-worker 1 or --workers-per-trial 1"
        )
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(
            f"search.gpus_per_worker must be whole above 1, as Ray hands out GPUs: found {gpus:g}: round --gpus-per-worker"
        )
    if gpus and not _exact(gpus):
        raise ConfigError(f"search.gpus_per_worker must be 0 or at least {1 / UNIT:g}, Ray's unit: found {gpus:g}")


def _cpus_per_worker(gpus: float, resources: ClusterResources) -> float:
    """A worker's share of the CPUs beside its GPU; one CPU where it has no GPU."""
    if not gpus:
        return 1.0
    per_gpu = (
        _exact(resources.cpus_per_gpu)
        if resources.cpus_per_gpu
        else _exact(resources.cpus) / _exact(max(resources.gpus, 1))
    )
    beside = per_gpu * int(gpus) if gpus >= 1 else per_gpu / _workers_per_gpu(gpus)
    return max(1.0, float(math.floor(beside)))


def _workers_on(node: tuple[float, float], cpus: float, gpus: float) -> int:
    """Workers for which a node has CPUs and GPUs; a part of a GPU is always a part of one and the same GPU."""
    by_cpus = math.floor(_exact(node[0]) / _exact(cpus))
    if not gpus:
        return by_cpus
    by_gpus = math.floor(_exact(node[1]) / _exact(gpus)) if gpus >= 1 else int(node[1]) * _workers_per_gpu(gpus)
    return min(by_cpus, by_gpus)


def _workers_per_gpu(gpus: float) -> int:
    return math.floor(1 / _exact(gpus))


def _exact(amount: float) -> Fraction:
    """An amount of a resource as Ray counts it, without a float's rounding."""
    return Fraction(round(amount * UNIT), UNIT)


@contextmanager
def ray_running(
    address: str | None, resources: ClusterResources | None, verbose: bool, insecure: bool = False
) -> Iterator[ClusterResources]:
    """Ray for as long as the block lasts.

    Args:
        address: Of a cluster to join; None starts one here that ends with the block.
        resources: What the Ray of our own may use; None where one is joined.
        verbose: Whether Ray may speak.
        insecure: Whether to join a cluster that asks nobody for a token.

    Yields:
        What Ray has.

    Raises:
        ConfigError: There is no cluster at the address, it does not let us in, or it lets everybody in.
    """
    os.environ.update(SETTINGS if address else SETTINGS | OWN_SETTINGS)
    level = logging.INFO if verbose else logging.WARNING
    quiet = {"logging_level": level, "log_to_driver": verbose}
    if not verbose:
        ray._private.worker._worker_logs_enabled = (
            False  # what the raylet prints when a worker dies is told in our words
        )
        quiet_ray()
    there = find(address) if address else None
    asks = enter(there, insecure) if there else True
    with ExitStack() as stack:
        try:
            if there:
                ray.init(address=there, **quiet)
            else:
                assert resources is not None
                _start_own(resources, stack, quiet)
        except ConfigError:
            raise
        except Exception as error:  # Ray raises what it likes, bare Exception where a node does not come up in time
            raise _unusable(address, error) from None
        stack.callback(ray.shutdown)
        stack.enter_context(
            freeing_orphans()
        )  # after the trials, too: the scoring would miss what the last of them left
        found = current_resources(f"the cluster at {address}" if address else "this machine")
        yield replace(found, requires_token=asks)


def _start_own(resources: ClusterResources, stack: ExitStack, quiet: Mapping[str, Any]) -> None:
    """Start a Ray of this machine, whatever other Ray the environment names or the machine runs."""
    os.environ.pop("RAY_ADDRESS", None)  # this process and its workers belong to no other cluster
    ensure_token()
    ray.init(
        address="local",
        num_cpus=int(resources.cpus),
        num_gpus=int(resources.gpus),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _temp_dir=stack.enter_context(ray_temp_dir()),
        **quiet,
    )


def _unusable(address: str | None, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200]
    if address:
        return ConfigError(
            f"Ray at {address} cannot be used: {reason}: look at it with `ray status`, and compare versions with "
            f"`python -m csmae doctor --address {address}`"
        )
    return ConfigError(
        f"Ray on this machine cannot be used: {reason}: run again with --verbose to see Ray's own logs, and see that memory and "
        "the temporary folder (TMPDIR) are not full"
    )


def current_resources(where: str) -> ClusterResources:
    """What the Ray that runs has at the moment, without nodes that will be taken away.

    Args:
        where: Names it in errors.
    """
    going = state.get_draining_nodes()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    types = sorted({key for node in nodes for key in node if key.startswith(ACCELERATOR)})
    kinds = {
        key.removeprefix(ACCELERATOR): _sum([node for node in nodes if key in node], f"{where}, with {key},")
        for key in types
    }
    return replace(_sum(nodes, where), kinds=kinds)


def _sum(nodes: list[Mapping[str, float]], where: str) -> ClusterResources:
    per_gpu = min((node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU")), default=None)
    pairs = tuple((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    return ClusterResources(sum(cpus for cpus, _ in pairs), sum(gpus for _, gpus in pairs), where, per_gpu, nodes=pairs)
