"""Resources of clusters: what fits on them, nodes that join and leave during a search, types of accelerators."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from csmae.cluster.resources import ClusterResources, allocate
from csmae.config import ConfigError
from csmae.study.options import Search
from tests.support.own_cluster import OwnCluster, own_cluster, stop
from tests.support.searches import ROOT, write

BY_ACCELERATOR = {
    "T4": ClusterResources(4, 1, "the lab's T4", 4.0),
    "H100": ClusterResources(16, 2, "the lab's H100", 8.0),
}
RESOURCES = ClusterResources(20, 3, "the lab", 4.0, by_accelerator=BY_ACCELERATOR)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[OwnCluster]:
    with own_cluster(tmp_path, num_cpus=1) as cluster:
        yield cluster


def start(folder: Path, cluster: OwnCluster, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "search.py"), str(write(folder, scheduler="none"))]
    command += ["--storage", str(folder / "runs"), "--address", cluster.address, *options]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env=os.environ | cluster.environment
        )


def wait_for(driver: subprocess.Popen[str], folder: Path, text: str) -> str:
    while text not in (log := (folder / "log").read_text()):
        assert driver.poll() is None, log
        time.sleep(0.1)
    return log


def test_an_accelerator_type_selects_its_nodes() -> None:
    assert allocate(Search(), RESOURCES).max_concurrent == 3
    allocation = allocate(Search(accelerator_type="H100"), RESOURCES)
    assert (allocation.max_concurrent, allocation.cpus_per_worker, allocation.accelerator_type) == (2, 8.0, "H100")
    with pytest.raises(ConfigError, match="needs 2 GPUs, the lab's T4 has 1"):
        allocate(Search(accelerator_type="T4", workers_per_trial=2), RESOURCES)
    with pytest.raises(ConfigError, match="A10G: the accelerators of the lab are: H100, T4: name one"):
        allocate(Search(accelerator_type="A10G"), RESOURCES)


@pytest.mark.parametrize(
    ("gpus_per_worker", "resources", "max_concurrent", "cpus"),
    [
        (0.2, ClusterResources(64, 1, "a"), 5, 12.0),
        (0.1, ClusterResources(64, 3, "a"), 30, 2.0),
        (0.4, ClusterResources(64, 4, "a"), 8, 8.0),
        (0.3, ClusterResources(64, 4, "a"), 12, 5.0),
        (0.3333, ClusterResources(64, 1, "a"), 3, 21.0),
        (0.2, ClusterResources(4, 1, "a"), 4, 1.0),
        (2, ClusterResources(32, 6, "a", 4.0, nodes=((16, 3), (16, 3))), 2, 8.0),
        (0.6, ClusterResources(32, 4, "a", 8.0, nodes=((16, 2), (16, 2))), 4, 8.0),
        (1, ClusterResources(24, 2, "a", 4.0, nodes=((8, 2), (16, 0))), 2, 4.0),
        (0, ClusterResources(3, 0, "a", nodes=((1.5, 0), (1.5, 0))), 2, 1.0),
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
            ClusterResources(8, 2, "lab", 4.0, nodes=((4, 1), (4, 1))),
            "hold 0 such workers: lower",
        ),
        (
            {"workers_per_trial": 3},
            ClusterResources(3, 0, "lab", nodes=((1.5, 0), (1.5, 0))),
            "hold 2 such workers: lower",
        ),
        ({"gpus_per_worker": 1.5}, ClusterResources(8, 4, "lab"), "must be whole above 1, .* found 1.5"),
        ({"gpus_per_worker": 0.00001}, ClusterResources(8, 4, "lab"), "must be 0 or at least 0.0001"),
    ],
)
def test_workers_that_no_node_can_hold_are_rejected(
    settings: dict[str, float], resources: ClusterResources, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        allocate(Search(**settings), resources)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_follow_the_nodes_that_join_and_leave(cluster: OwnCluster, tmp_path: Path) -> None:
    driver = start(tmp_path, cluster, "--num-trials", "2", "--set", "train.epochs=150")
    wait_for(driver, tmp_path, "trial 0 epoch 1/150")
    assert "trial 1 starts" not in (tmp_path / "log").read_text()
    node = cluster.add_node(1)
    assert "trial 0 completed" not in wait_for(driver, tmp_path, "trial 1 epoch 1/150")
    stop(node)
    assert driver.wait(400) == 0, (tmp_path / "log").read_text()
    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/runs/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_does_not_wait_for_a_missing_accelerator(cluster: OwnCluster, tmp_path: Path) -> None:
    options = ["--accelerator-type", "T4", "--gpus-per-worker", "0", "--num-trials", "1", "--set", "train.epochs=2"]
    driver = start(tmp_path, cluster, *options)
    assert driver.wait(100) == 2
    line = (tmp_path / "log").read_text()
    assert "are: none that Ray knows" in line and line.count("\n") == 1
    cluster.add_node(1, accelerator_type="T4")
    driver = start(tmp_path, cluster, *options)
    assert driver.wait(200) == 0, (tmp_path / "log").read_text()
