"""Trials that pause in one worker group and resume in another, on a real Ray with two CPUs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import tune

from csmae.cluster.resources import Allocation, ClusterResources
from csmae.cluster.session import ray_running
from csmae.config import Config
from csmae.training.trainer import pretrain
from csmae.workers.group import WorkerGroupTrainable
from csmae.workers.spec import WorkerGroupSpec
from tests.conftest import small_config
from tests.training.test_resume import losses

QUICK = "tests.support.stub_training:quick"


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterResources]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # the workers import the stub from here
    with ray_running(None, ClusterResources(((2, 0),), "this machine"), verbose=False) as resources:
        yield resources


class Group:
    """A worker group of one worker, driven as Tune drives it.

    Args:
        folder: Of the study; each trial has a folder in it.
        pretrain: What trains.
    """

    def __init__(self, folder: Path, pretrain: str) -> None:
        self._folder = folder
        scratch = folder / "scratch"
        spec = WorkerGroupSpec(Allocation(2, 1, 1.0, 0.0), 2, 120.0, str(scratch), pretrain=pretrain)
        self._class = ray.remote(num_cpus=0)(tune.with_parameters(WorkerGroupTrainable, spec=spec))
        self._actor: Any = None

    def train(self, trial: int, config: Config, until: int, parent: int | None = None) -> list[dict[str, Any]]:
        """Train an assignment; returns the results of its steps, without those about resources."""
        assignment = {
            "config": config.model_dump(mode="json"),
            "run_dir": str(self.run_dir(trial)),
            "until": until,
            "parent_dir": None if parent is None else str(self.run_dir(parent)),
        }
        if self._actor is None:
            self._actor = self._class.remote(assignment)
        else:
            assert ray.get(self._actor.reset_config.remote(assignment))
        results: list[dict[str, Any]] = []
        while not (results and results[-1].get("done")):
            results.append(ray.get(self._actor.step.remote()))
        return [result for result in results if "resources_held" not in result]

    def run_dir(self, trial: int) -> Path:
        return self._folder / "study" / "trials" / str(trial)

    def starts(self, trial: int) -> list[tuple[str, str]]:
        """Process and first epoch's predecessor of each training of a trial."""
        lines = (self.run_dir(trial) / "pids-0").read_text().splitlines()
        return [(line.split()[0], line.split()[2]) for line in lines]

    def close(self) -> None:
        ray.get(self._actor.stop.remote())
        ray.kill(self._actor)


@pytest.fixture
def groups(cluster: ClusterResources, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Group]]:
    made = [Group(tmp_path, request.param) for _ in range(2)]
    yield made
    for group in made:
        group.close()


def epochs(results: list[dict[str, Any]]) -> list[int]:
    return [result["epoch"] for result in results]


@pytest.mark.parametrize("groups", [QUICK], indirect=True)
def test_a_trial_pauses_in_one_group_and_resumes_in_another(groups: list[Group]) -> None:
    first, second = groups
    config = small_config(train__epochs=5)
    results = first.train(0, config, until=2)
    assert epochs(results) == [1, 2] and results[-1]["paused"] == "" and "finished" not in results[-1]
    copied = first.train(1, config, until=3, parent=0)
    assert epochs(copied) == [3] and copied[-1]["paused"] == ""
    resumed = second.train(0, config, until=4)
    assert epochs(resumed) == [3, 4] and resumed[-1]["paused"] == ""
    finished = first.train(0, config, until=5)
    assert epochs(finished) == [5] and finished[-1]["finished"] == "" and "paused" not in finished[-1]
    processes, starts = zip(*first.starts(0), strict=True)
    assert starts == ("0", "2", "4")
    assert processes[0] == processes[2] != processes[1], "both groups kept their workers"
    assert first.starts(1) == [(processes[0], "2")]


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["tests.support.stub_training:killed_before_its_pause_is_reported"], indirect=True)
def test_a_worker_that_is_killed_after_it_saved_a_pause_loses_nothing(groups: list[Group], tmp_path: Path) -> None:
    first, second = groups
    config = small_config()
    (whole,) = [list(pretrain(config, tmp_path / "whole"))]
    results = first.train(0, config, until=2) + second.train(0, config, until=4)
    assert (first.run_dir(0) / "killed-2").exists() and (first.run_dir(0) / "killed-4").exists()
    assert [name for result in results for name in ("paused", "finished") if name in result] == ["paused", "finished"]
    by_epoch = {result["epoch"]: losses(result["metrics"]) for result in results}
    assert by_epoch == {epoch.number: losses(epoch.metrics) for epoch in whole}
    saved = [
        torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (tmp_path / "whole", first.run_dir(0))
    ]
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("groups", [QUICK], indirect=True)
def test_a_worker_that_is_killed_in_the_epoch_of_a_pause_trains_it_again(groups: list[Group], tmp_path: Path) -> None:
    first, second = groups
    config = small_config(train__epochs=4)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "faults.json").write_text('{"0": ["kill", 2, 0, 1]}')
    results = first.train(0, config, until=2)
    assert epochs(results) == [1, 2] and results[-1]["paused"] == ""
    assert [start for _, start in first.starts(0)] == ["0", "1"]
    assert epochs(second.train(0, config, until=4)) == [3, 4]
