"""CPUs and GPUs of this machine or of a cluster, and how many trials they can train at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import ray

from csmae.cluster.ray_private import draining_nodes
from csmae.config import ConfigError
from csmae.cpus import usable_cpus
from csmae.study.options import Search

ACCELERATOR_PREFIX = "accelerator_type:"
"""Start of the name of the resource by which Ray marks nodes that have a type of accelerator."""

ACCELERATOR_AMOUNT = 0.001
"""Amount of that resource that a worker requests, as Ray does for ``accelerator_type``: enough to select the node."""

RESOURCE_UNITS = 10_000
"""Ray counts resources in ten-thousandths."""

REFRESH_INTERVAL_S = 5.0


@dataclass(frozen=True)
class ClusterResources:
    """CPUs and GPUs that a search may use."""

    nodes: tuple[tuple[float, float], ...]
    """CPUs and GPUs of each node."""
    where: str
    """Name of the machine or cluster in messages, such as ``this machine``."""
    by_accelerator: Mapping[str, ClusterResources] = field(default_factory=dict)
    """By Ray's accelerator type, the resources of the nodes that have it."""
    requires_token: bool = True
    """Whether Ray rejects clients that have no token."""

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(gpus for _, gpus in self.nodes)


@dataclass(frozen=True)
class Allocation:
    """How many trials run at a time, and the number and resources of their workers."""

    max_concurrent: int
    workers_per_trial: int
    cpus_per_worker: float
    gpus_per_worker: float
    accelerator_type: str | None = None

    def __str__(self) -> str:
        """A trial's workers in words, such as ``2 x 4 CPU and 1 GPU``."""
        worker = " and ".join(f"{amount:g} {name}" for name, amount in self.worker_resources.items())
        return f"{self.workers_per_trial} x {worker}"

    @property
    def worker_resources(self) -> dict[str, float]:
        """CPUs and GPUs of a worker under Ray's names."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker} | gpus

    @property
    def bundle(self) -> dict[str, float]:
        """A worker's resources as a bundle of a placement group, which has to name the accelerator type too."""
        kind = {f"{ACCELERATOR_PREFIX}{self.accelerator_type}": ACCELERATOR_AMOUNT} if self.accelerator_type else {}
        return self.worker_resources | kind


def local_resources() -> ClusterResources:
    """The resources of this machine that this process may use."""
    import torch

    return ClusterResources(((usable_cpus(), torch.cuda.device_count()),), "this machine")


def current_resources(where: str) -> ClusterResources:
    """The resources that the connected Ray has now, without nodes that will be preempted.

    Args:
        where: Name of the cluster in messages.
    """
    draining = draining_nodes()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    accelerators = sorted({key for node in nodes for key in node if key.startswith(ACCELERATOR_PREFIX)})
    by_accelerator = {
        key.removeprefix(ACCELERATOR_PREFIX): ClusterResources(
            _cpus_and_gpus(node for node in nodes if key in node), f"{where}, with {key},"
        )
        for key in accelerators
    }
    return ClusterResources(_cpus_and_gpus(nodes), where, by_accelerator)


def _cpus_and_gpus(nodes: Iterable[Mapping[str, float]]) -> tuple[tuple[float, float], ...]:
    return tuple((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)


def allocate(search: Search, resources: ClusterResources) -> Allocation:
    """Divide the resources among trials of ``workers_per_trial`` workers.

    Raises:
        ConfigError: Not even one trial fits, or workers of one trial would share a GPU.
    """
    workers, accelerator = search.workers_per_trial, search.accelerator_type
    if accelerator:
        if accelerator not in resources.by_accelerator:
            found = ", ".join(sorted(resources.by_accelerator)) or "none that Ray knows"
            raise ConfigError(
                f"search.accelerator_type {accelerator}: the accelerators of {resources.where} are: {found}: name one of them, or none"
            )
        resources = resources.by_accelerator[accelerator]
    gpus = search.gpus_per_worker if search.gpus_per_worker is not None else float(resources.gpus > 0)
    _check_gpus(gpus, workers)
    needs = [("CPUs", 1.0, resources.cpus)] + ([("GPUs", gpus, resources.gpus)] if gpus else [])
    for name, per_worker, available in needs:
        if workers * _exact(per_worker) > _exact(available):
            raise ConfigError(
                f"search.workers_per_trial {workers} needs {workers * per_worker:g} {name}, {resources.where} has {available:g}: "
                "lower --workers-per-trial or --gpus-per-worker"
            )
    cpus = _cpus_per_worker(gpus, resources)
    num_workers = sum(_workers_on(node, cpus, gpus) for node in resources.nodes)
    allocation = Allocation(min(num_workers // workers, search.num_trials), workers, cpus, gpus, accelerator)
    if not allocation.max_concurrent:
        raise ConfigError(
            f"search.workers_per_trial {workers} needs {allocation}, each worker on one node; "
            f"the nodes of {resources.where} hold {num_workers} such workers: lower --workers-per-trial or --gpus-per-worker"
        )
    return allocation


def _check_gpus(gpus: float, workers: int) -> None:
    if 0 < gpus < 1 and workers > 1:
        raise ConfigError(
            f"search.gpus_per_worker must be whole where a trial has {workers} workers: found {gpus:g}; "
            "two workers of one trial cannot share a GPU: set --gpus-per-worker 1 or --workers-per-trial 1"
        )
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(
            f"search.gpus_per_worker must be whole above 1, as Ray allocates whole GPUs: found {gpus:g}: round --gpus-per-worker"
        )
    if gpus and not _exact(gpus):
        raise ConfigError(
            f"search.gpus_per_worker must be 0 or at least {1 / RESOURCE_UNITS:g}, Ray's unit: found {gpus:g}"
        )


def _cpus_per_worker(gpus: float, resources: ClusterResources) -> float:
    """A worker's share of the CPUs beside its GPU, on the node that has the fewest per GPU; one CPU without a GPU."""
    if not gpus:
        return 1.0
    per_gpu = min(_exact(node_cpus) / _exact(node_gpus) for node_cpus, node_gpus in resources.nodes if node_gpus)
    share = per_gpu * int(gpus) if gpus >= 1 else per_gpu / _workers_per_gpu(gpus)
    return max(1.0, float(math.floor(share)))


def _workers_on(node: tuple[float, float], cpus: float, gpus: float) -> int:
    """Workers for which a node has the CPUs and GPUs; a fraction of a GPU always belongs to one GPU."""
    by_cpus = math.floor(_exact(node[0]) / _exact(cpus))
    if not gpus:
        return by_cpus
    by_gpus = math.floor(_exact(node[1]) / _exact(gpus)) if gpus >= 1 else int(node[1]) * _workers_per_gpu(gpus)
    return min(by_cpus, by_gpus)


def _workers_per_gpu(gpus: float) -> int:
    return math.floor(1 / _exact(gpus))


def _exact(amount: float) -> Fraction:
    """An amount as Ray counts it, without a float's rounding error."""
    return Fraction(round(amount * RESOURCE_UNITS), RESOURCE_UNITS)


class ConcurrencyLimit:
    """How many trials fit on the cluster while nodes join and leave.

    Args:
        search: Resources of a trial.
        initial: Trials that fit at the start.
    """

    def __init__(self, search: Search, initial: int) -> None:
        self._search, self._limit, self._refreshed_at = search, initial, time.monotonic()

    def __call__(self) -> int:
        """The limit, at most ``REFRESH_INTERVAL_S`` old; 0 while the cluster has no resources for a trial."""
        if time.monotonic() - self._refreshed_at > REFRESH_INTERVAL_S:
            self._refreshed_at = time.monotonic()
            try:
                self._limit = allocate(self._search, current_resources("the cluster")).max_concurrent
            except ConfigError:
                self._limit = 0
        return self._limit
