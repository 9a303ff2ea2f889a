"""Warm groups on a real Ray with two CPUs: reuse, early stopping, and what happens when something dies."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from optuna.trial import FrozenTrial
from ray.util import placement_group_table

from csmae.tuning.cluster import Room, ray_running, share
from csmae.tuning.events import Event
from csmae.tuning.ledger import Ledger
from csmae.tuning.run import run_search
from csmae.tuning.study import load_study
from test_study import write

ROOM = Room(2, 0, "this machine")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Room]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the workers import the stub from here
    with ray_running(None, ROOM, verbose=False) as room:
        yield room


def search(folder: Path, num_trials: int, faults: dict[int, list[Any]], **settings: Any) -> list[FrozenTrial]:
    """Run a study of quick trainings in which some trials go wrong."""
    base = {"model": {"size": "nano"}, "optim": {"warmup_epochs": 0, "batch_size": 2}, "train": {"epochs": 5}}
    space = {"masking.ratio": {"float": [0.3, 0.9]}}
    settings = {"workers_per_trial": 2, "sampler": "random", "scheduler": "none", **settings}
    study = load_study(write(folder, space, base=base, num_trials=num_trials, **settings))
    (folder / "study").mkdir(exist_ok=True)
    (folder / "study" / "faults.json").write_text(json.dumps(faults))
    ledger, events = Ledger(study, folder), list[Event]()
    assert run_search(ledger, folder / "study", share(study.search, ROOM), events.append, "stub_training:quick")
    return ledger.trials()


def processes(folder: Path, trial: int, rank: int) -> list[str]:
    """The process that trained, and the epoch it went on from, for each attempt at a trial."""
    return (folder / "study" / "trials" / str(trial) / f"pids-{rank}").read_text().splitlines()


def reserved() -> int:
    """Placement groups that hold something."""
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_one_group_serves_all_trials_and_stopped_ones_are_pruned(cluster: Room, tmp_path: Path) -> None:
    trials = search(tmp_path, 8, {}, scheduler="asha", seed=1)
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    assert len({line for n in range(8) for line in processes(tmp_path, n, 0)}) == 1
    assert processes(tmp_path, 0, 0) != processes(tmp_path, 0, 1)
    for trial in trials:
        if trial.state.name == "PRUNED":
            epoch = int((tmp_path / "study" / "trials" / str(trial.number) / "epoch").read_text())
            assert epoch == max(trial.intermediate_values) < 5
    assert reserved() == 0


def test_failures_end_or_delay_their_trial_and_no_other(cluster: Room, tmp_path: Path) -> None:
    faults = {
        1: ["diverge", 2, 0, 9],
        3: ["raise", 3, 1, 1],
        5: ["kill", 3, 0, 1],
        7: ["raise", 2, 1, 9],
    }
    trials = search(tmp_path, 9, faults, retries=1)
    assert [t.number for t in trials if t.state.name == "FAIL"] == [1, 7]
    assert [t.number for t in trials if t.state.name == "COMPLETE"] == [0, 2, 3, 4, 5, 6, 8]
    assert trials[1].user_attrs["reason"] == "the loss is not finite in epoch 2"
    assert trials[7].user_attrs["reason"] == "RuntimeError on rank 1: out of memory, say (in each of 2 attempts)"
    assert processes(tmp_path, 2, 0) == processes(tmp_path, 0, 0)
    for number in (3, 5):
        assert [line.split()[2] for line in processes(tmp_path, number, 0)] == ["0", "2"]
        assert sorted(trials[number].intermediate_values) == [1, 2, 3, 4, 5]
    assert len(processes(tmp_path, 7, 0)) == 2
    assert reserved() == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill slot", "kill controller"])
def test_a_killed_slot_or_controller_costs_time_and_nothing_else(cluster: Room, tmp_path: Path, what: str) -> None:
    trials = search(tmp_path, 3, {1: [what, 3, 0, 1]})
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert [line.split()[2] for line in processes(tmp_path, 1, 0)] == ["0", "2"]
    assert reserved() == 0
    assert ray.available_resources()["CPU"] == 2
