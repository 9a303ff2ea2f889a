"""How many trials fit on a machine or a cluster at a time, and with which resources."""

from typing import Any

import pytest

from csmae.cluster.resources import ClusterResources, allocate
from csmae.config import ConfigError
from csmae.study.options import Search

BY_ACCELERATOR = {
    "T4": ClusterResources(((4, 1),), "the lab's T4"),
    "H100": ClusterResources(((16, 2),), "the lab's H100"),
}
LAB = ClusterResources(((4, 1), (16, 2)), "the lab", BY_ACCELERATOR)


def machine(cpus: float, gpus: float) -> ClusterResources:
    return ClusterResources(((cpus, gpus),), "here")


@pytest.mark.parametrize(
    ("settings", "resources", "expected"),
    [
        ({"workers_per_trial": 2}, machine(2, 0), (1, 1.0, 0.0)),
        ({"workers_per_trial": 2}, machine(9, 0), (4, 1.0, 0.0)),
        ({"workers_per_trial": 1, "num_trials": 3}, machine(9, 0), (3, 1.0, 0.0)),
        ({"workers_per_trial": 2}, machine(32, 8), (4, 4.0, 1.0)),
        ({"workers_per_trial": 1, "gpus_per_worker": 0.5}, machine(8, 1), (2, 4.0, 0.5)),
        ({"workers_per_trial": 1}, ClusterResources(((4, 0), (8, 1)), "a head and a node"), (1, 8.0, 1.0)),
        ({"workers_per_trial": 4, "gpus_per_worker": 0}, machine(8, 1), (2, 1.0, 0.0)),
    ],
)
def test_resources_are_divided_among_concurrent_trials(
    settings: dict[str, Any], resources: ClusterResources, expected: tuple[int, float, float]
) -> None:
    allocation = allocate(Search(**settings), resources)
    assert (allocation.max_concurrent, allocation.cpus_per_worker, allocation.gpus_per_worker) == expected


@pytest.mark.parametrize(
    ("settings", "resources", "text"),
    [
        ({"workers_per_trial": 3}, machine(2, 0), "needs 3 CPUs, here has 2"),
        ({"workers_per_trial": 2}, machine(8, 1), "needs 2 GPUs, here has 1"),
        ({"gpus_per_worker": 1}, machine(8, 0), "needs 1 GPUs, here has 0"),
        ({"gpus_per_worker": 0.5, "workers_per_trial": 2}, machine(8, 2), "cannot share a GPU"),
    ],
)
def test_missing_resources_are_named(settings: dict[str, Any], resources: ClusterResources, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        allocate(Search(**settings), resources)


def test_an_accelerator_type_selects_its_nodes() -> None:
    assert allocate(Search(), LAB).max_concurrent == 3
    allocation = allocate(Search(accelerator_type="H100"), LAB)
    assert (allocation.max_concurrent, allocation.cpus_per_worker, allocation.accelerator_type) == (2, 8.0, "H100")
    with pytest.raises(ConfigError, match="needs 2 GPUs, the lab's T4 has 1"):
        allocate(Search(accelerator_type="T4", workers_per_trial=2), LAB)
    with pytest.raises(ConfigError, match="A10G: the accelerators of the lab are: H100, T4: name one"):
        allocate(Search(accelerator_type="A10G"), LAB)


@pytest.mark.parametrize(
    ("gpus_per_worker", "resources", "max_concurrent", "cpus"),
    [
        (0.2, machine(64, 1), 5, 12.0),
        (0.1, machine(64, 3), 30, 2.0),
        (0.4, machine(64, 4), 8, 8.0),
        (0.3, machine(64, 4), 12, 5.0),
        (0.3333, machine(64, 1), 3, 21.0),
        (0.2, machine(4, 1), 4, 1.0),
        (2, ClusterResources(((16, 3), (12, 3)), "a"), 2, 8.0),
        (3, ClusterResources(((16, 3), (16, 3)), "a"), 2, 16.0),
        (0.6, ClusterResources(((16, 2), (16, 2)), "a"), 4, 8.0),
        (1, ClusterResources(((8, 2), (16, 0)), "a"), 2, 4.0),
        (0, ClusterResources(((1.5, 0), (1.5, 0)), "a"), 2, 1.0),
    ],
)
def test_workers_are_counted_node_by_node_and_gpu_by_gpu(
    gpus_per_worker: float, resources: ClusterResources, max_concurrent: int, cpus: float
) -> None:
    allocation = allocate(Search(gpus_per_worker=gpus_per_worker, num_trials=99), resources)
    assert (allocation.max_concurrent, allocation.cpus_per_worker) == (max_concurrent, cpus)


@pytest.mark.parametrize(
    ("settings", "resources", "text"),
    [
        (
            {"gpus_per_worker": 2},
            ClusterResources(((4, 1), (4, 1)), "lab"),
            "hold 0 such workers: lower",
        ),
        (
            {"workers_per_trial": 3},
            ClusterResources(((1.5, 0), (1.5, 0)), "lab"),
            "hold 2 such workers: lower",
        ),
        ({"gpus_per_worker": 1.5}, machine(8, 4), "must be whole above 1, .* found 1.5"),
        ({"gpus_per_worker": 0.00001}, machine(8, 4), "must be 0 or at least 0.0001"),
    ],
)
def test_workers_that_no_node_can_hold_are_rejected(
    settings: dict[str, float], resources: ClusterResources, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        allocate(Search(**settings), resources)
