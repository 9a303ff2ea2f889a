"""Worker groups on a real Ray with two CPUs: reuse, early stopping, and what happens when a process dies."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from optuna.trial import FrozenTrial
from ray._private.state import actors
from ray.util import placement_group, placement_group_table, remove_placement_group

from csmae.cluster.resources import ClusterResources, allocate
from csmae.cluster.session import ray_running
from csmae.study.study import load_study
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.driver import run_search
from csmae.tuning.events import Listener, SearchEnd, SearchEvent, SearchOutcome, TrialEnded
from csmae.workers.group import GROUP_RESTARTS
from csmae.workers.worker import MAX_COMPILED_TRIALS
from tests.conftest import SMALL
from tests.study.test_study import write

DONE = SearchEnd(SearchOutcome.COMPLETED)

RESOURCES = ClusterResources(((2, 0),), "this machine")


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterResources]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # the workers import the stub from here
    with ray_running(None, RESOURCES, verbose=False) as resources:
        yield resources


def search(
    folder: Path,
    num_trials: int,
    faults: dict[int, list[Any]],
    ending: SearchEnd = DONE,
    listener: Listener = lambda event: None,
    compile: bool = False,
    pretrain: str = "tests.support.stub_training:quick",
    base: dict[str, Any] | None = None,
    **settings: Any,
) -> list[FrozenTrial]:
    """Run a study of quick trainings in which some trials fail."""
    base = base or {
        "model": {"size": "nano"},
        "optim": {"warmup_epochs": 0, "batch_size": 2},
        "train": {"epochs": 5, "compile": compile},
    }
    space = {"masking.ratio": {"float": [0.3, 0.9]}}
    settings = {"workers_per_trial": 2, "sampler": "random", "strategy": "none", **settings}
    study = load_study(write(folder, space, base=base, num_trials=num_trials, **settings))
    (folder / "study").mkdir(exist_ok=True)
    (folder / "study" / "faults.json").write_text(json.dumps(faults))
    trial_store = TrialStore(study, folder)
    assert run_search(Budget(trial_store), allocate(study.search, RESOURCES), listener, pretrain) == ending
    return trial_store.trials()


def processes(folder: Path, trial: int, rank: int) -> list[str]:
    """For each attempt at a trial, the process that trained and the epoch from which it resumed."""
    return (folder / "study" / "trials" / str(trial) / f"pids-{rank}").read_text().splitlines()


def all_resources_are_free() -> bool:
    """Whether no reservation is left, now or in a moment: Ray removes them asynchronously."""
    for _ in range(100):
        left = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        if not left and ray.available_resources().get("CPU") == RESOURCES.cpus:
            return True
        time.sleep(0.1)
    return False


def test_one_group_trains_all_trials_and_stopped_ones_are_pruned(cluster: ClusterResources, tmp_path: Path) -> None:
    trials = search(tmp_path, 8, {}, strategy="asha", seed=1)
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    assert len({line for n in range(8) for line in processes(tmp_path, n, 0)}) == 1
    assert processes(tmp_path, 0, 0) != processes(tmp_path, 0, 1)
    for trial in trials:
        if trial.state.name == "PRUNED":
            epoch = int((tmp_path / "study" / "trials" / str(trial.number) / "epoch").read_text())
            assert epoch == max(trial.intermediate_values) < 5
    assert all_resources_are_free()


@pytest.mark.slow
def test_a_group_that_compiled_many_trials_is_replaced(cluster: ClusterResources, tmp_path: Path) -> None:
    trials = search(tmp_path, MAX_COMPILED_TRIALS + 2, {}, compile=True)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * (MAX_COMPILED_TRIALS + 2)
    groups = [processes(tmp_path, number, 0) for number in range(MAX_COMPILED_TRIALS + 2)]
    assert (
        groups[0] == groups[MAX_COMPILED_TRIALS - 1] != groups[MAX_COMPILED_TRIALS] == groups[MAX_COMPILED_TRIALS + 1]
    )
    assert all(len(group) == 1 for group in groups)
    assert all_resources_are_free()


def test_a_failure_ends_or_delays_only_its_own_trial(cluster: ClusterResources, tmp_path: Path) -> None:
    trials = search(tmp_path, 5, {1: ["diverge", 2, 0, 9], 3: ["raise", 3, 1, 1]})
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert trials[1].user_attrs["reason"] == "the loss is not finite in epoch 2"
    assert processes(tmp_path, 2, 0) == processes(tmp_path, 0, 0)
    assert [line.split()[2] for line in processes(tmp_path, 3, 0)] == ["0", "2"]
    assert sorted(trials[3].intermediate_values) == [1, 2, 3, 4, 5]
    assert all_resources_are_free()


@pytest.mark.slow
def test_a_trial_that_kills_its_group_each_time_fails_after_its_retries(
    cluster: ClusterResources, tmp_path: Path
) -> None:
    trials = search(tmp_path, 4, {1: ["raise", 2, 1, 9], 2: ["kill", 2, 0, 9]}, retries=1)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert trials[1].user_attrs["reason"] == "RuntimeError on rank 1: out of memory, say (in each of 2 attempts)"
    assert trials[2].user_attrs["reason"].endswith("(in each of 2 attempts)")
    assert [len(processes(tmp_path, number, 0)) for number in range(4)] == [1, 2, 2, 1]


@pytest.mark.slow
def test_a_full_disk_stops_the_search_and_loses_no_trial(cluster: ClusterResources, tmp_path: Path) -> None:
    trials = search(
        tmp_path, 3, {1: ["fill", 3, 0, 1]}, ending=SearchEnd(SearchOutcome.STORAGE_FAILED, "the disk is full, say")
    )
    assert [trial.state.name for trial in trials] == ["COMPLETE", "RUNNING"]
    trials = search(tmp_path, 3, {1: ["fill", 3, 0, 1]})
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert [line.split()[2] for line in processes(tmp_path, 1, 0)] == ["0", "2"]


@pytest.mark.slow
def test_a_permanent_error_is_not_retried(cluster: ClusterResources, tmp_path: Path) -> None:
    trials = search(tmp_path, 3, {1: ["refuse", 2, 1, 9]})
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert trials[1].user_attrs["reason"] == "rank 1: a damaged archive, say"
    assert [len(processes(tmp_path, number, 1)) for number in range(3)] == [1, 1, 1]
    assert all_resources_are_free()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["hang", "stop"])
def test_a_rank_that_hangs_is_killed_and_the_trial_resumes(
    cluster: ClusterResources, tmp_path: Path, what: str
) -> None:
    trials = search(tmp_path, 3, {1: [what, 3, 1, 1]}, hang_timeout="10s")
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert [line.split()[2] for line in processes(tmp_path, 1, 0)] == ["0", "2"]
    stopped = int(processes(tmp_path, 1, 1)[0].split()[0])
    assert not Path(f"/proc/{stopped}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "kill trainable", "kill controller"])
def test_a_killed_process_costs_only_time(cluster: ClusterResources, tmp_path: Path, what: str) -> None:
    trials = search(tmp_path, 3, {1: [what, 3, 0, 1]})
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert [line.split()[2] for line in processes(tmp_path, 1, 0)] == ["0", "2"]
    assert all_resources_are_free()


@pytest.mark.slow
def test_waiting_for_resources_does_not_count_as_worker_time(cluster: ClusterResources, tmp_path: Path) -> None:
    taken, began = placement_group([{"CPU": 2}]), time.monotonic()
    assert taken.wait(60)
    threading.Timer(15, remove_placement_group, [taken]).start()
    (trial,) = search(tmp_path, 1, {})
    assert 0 < trial.user_attrs["worker_s"] < 2 * (time.monotonic() - began - 15)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_all_hang_before_their_first_trial_are_replaced(cluster: ClusterResources, tmp_path: Path) -> None:
    try:
        trials = search(tmp_path, 1, {}, pretrain="tests.support.stub_hang:quick", hang_timeout="10s")
    finally:
        for mark in Path(tempfile.gettempdir()).glob("csmae-hang-*"):
            mark.unlink()
    assert [trial.state.name for trial in trials] == ["COMPLETE"]
    assert all_resources_are_free()


@pytest.mark.slow
def test_out_of_memory_on_one_rank_costs_no_retries_down_to_one_pair(cluster: ClusterResources, tmp_path: Path) -> None:
    """More halvings than Ray Train restarts a group, and none of the trial's retries."""
    base = SMALL | {"optim": SMALL["optim"] | {"batch_size": 256}, "train": {"epochs": 2}, "eval": {"k": 3}}
    base["data"] = {"synthetic": {"num_train": 256, "num_validation": 24, "num_test": 16}}
    pretrain = "tests.support.stub_training:out_of_memory"
    (trial,) = search(tmp_path, 1, {}, pretrain=pretrain, base=base, retries=0)
    assert trial.state.name == "COMPLETE", trial.user_attrs
    assert len(processes(tmp_path, 0, 1)) == 8 > GROUP_RESTARTS + 1  # 128, 64, 32, 16, 8, 4, 2, 1 pairs
    assert (tmp_path / "study" / "trials" / "0" / "micro_batch").read_text() == "1"
    assert all_resources_are_free()


def kill_trainables(event: SearchEvent) -> None:
    """Kill the processes of this Ray's trainables when the first trial has ended."""
    if isinstance(event, TrialEnded) and event.number == 0:
        for actor in actors().values():
            if actor["ActorClassName"].endswith("ResourceTrainable") and actor["State"] == "ALIVE":
                os.kill(actor["Pid"], signal.SIGKILL)


@pytest.mark.slow
def test_a_trainable_that_dies_between_two_trials_loses_neither(cluster: ClusterResources, tmp_path: Path) -> None:
    trials = search(tmp_path, 3, {}, listener=kill_trainables)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert processes(tmp_path, 0, 0) != processes(tmp_path, 1, 0)
    assert all_resources_are_free()


def num_reserved() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_placement_groups_that_an_actor_creates_while_it_is_killed_are_removed(cluster: ClusterResources) -> None:
    class Greedy:  # local, so that the workers need not import this module
        def reserve(self) -> None:
            while True:
                placement_group([{"CPU": 0.001}])
                time.sleep(0.002)

    actors = [ray.remote(num_cpus=0)(Greedy).remote() for _ in range(4)]
    for actor in actors:
        actor.reserve.remote()
    while num_reserved() < 20:
        time.sleep(0.1)
    for actor in actors:
        ray.kill(actor)
    deadline = time.monotonic() + 60
    while num_reserved():
        assert time.monotonic() < deadline, f"{num_reserved()} reservations left"
        time.sleep(0.1)
