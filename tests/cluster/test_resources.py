"""How many trials fit on a cluster at the same time, and with what."""

from typing import Any

import pytest

from csmae.cluster.resources import ClusterResources, allocate
from csmae.config import ConfigError
from csmae.study.options import Search


@pytest.mark.parametrize(
    ("settings", "resources", "expected"),
    [
        ({"workers_per_trial": 2}, ClusterResources(2, 0, "here"), (1, 1.0, 0.0)),
        ({"workers_per_trial": 2}, ClusterResources(9, 0, "here"), (4, 1.0, 0.0)),
        ({"workers_per_trial": 1, "num_trials": 3}, ClusterResources(9, 0, "here"), (3, 1.0, 0.0)),
        ({"workers_per_trial": 2}, ClusterResources(32, 8, "here"), (4, 4.0, 1.0)),
        ({"workers_per_trial": 1, "gpus_per_worker": 0.5}, ClusterResources(8, 1, "here"), (2, 4.0, 0.5)),
        ({"workers_per_trial": 1}, ClusterResources(12, 1, "a head of 4 CPUs and a node of 8", 8.0), (1, 8.0, 1.0)),
        ({"workers_per_trial": 4, "gpus_per_worker": 0}, ClusterResources(8, 1, "here"), (2, 1.0, 0.0)),
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
        ({"workers_per_trial": 3}, ClusterResources(2, 0, "here"), "needs 3 CPUs, here has 2"),
        ({"workers_per_trial": 2}, ClusterResources(8, 1, "here"), "needs 2 GPUs, here has 1"),
        ({"gpus_per_worker": 1}, ClusterResources(8, 0, "here"), "needs 1 GPUs, here has 0"),
        ({"gpus_per_worker": 0.5, "workers_per_trial": 2}, ClusterResources(8, 2, "here"), "cannot share a GPU"),
    ],
)
def test_missing_resources_are_named(settings: dict[str, Any], resources: ClusterResources, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        allocate(Search(**settings), resources)
