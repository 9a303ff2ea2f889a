"""Nodes that join and leave during a search, and nodes with accelerators."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from tests.support.own_cluster import OwnCluster, own_cluster, stop
from tests.support.searches import ROOT, write


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[OwnCluster]:
    with own_cluster(tmp_path, num_cpus=1) as cluster:
        yield cluster


def start(folder: Path, cluster: OwnCluster, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "search.py"), str(write(folder, strategy="none"))]
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
