"""Random kills: a study from which workers or drivers are killed ends like an undisturbed one. Prints a table."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import yaml
from mlflow import MlflowClient
from optuna.trial import FrozenTrial

from csmae.trials.trial import assignments, status_of
from tests.conftest import SMALL
from tests.support.searches import ROOT, processes

ROUNDS = 20

Kill = Callable[[subprocess.Popen[str], random.Random], bool]
"""Kills a process of a driver, chosen by the random generator; returns whether there was one."""

NUM_TRIALS = 24
"""Trials at first; the search is extended until enough processes were killed."""

EXTENSION = 8
"""Trials by which a search is extended."""

EXIT_TIMEOUT_S = 120
"""After this time no process of a dead driver may run: Ray's agents exit a minute after their raylet."""


def start(folder: Path, num_trials: int) -> subprocess.Popen[str]:
    options = ["--storage", str(folder / "runs"), "--num-trials", str(num_trials)]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "search.py"), str(folder / "kills.yaml"), *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def kill_worker(driver: subprocess.Popen[str], generator: random.Random) -> bool:
    """Kill one of the train workers, if there is one yet."""
    workers = [pid for pid, title in processes(driver.pid).items() if title.startswith("ray::RayTrainWorker")]
    if workers:
        os.kill(generator.choice(workers), signal.SIGKILL)
    return bool(workers)


def kill_driver(driver: subprocess.Popen[str], generator: random.Random) -> bool:
    """Kill the driver; the next one starts immediately."""
    driver.kill()
    driver.wait()
    return True


def run_with_kills(folder: Path, kill: Kill, max_wait_s: float, seed: int) -> int:
    """Run a search and kill its processes repeatedly; return the number of trials to which it was extended.

    Args:
        folder: Of the study file and the storage.
        kill: Kills a process.
        max_wait_s: Longest time between two kills.
        seed: Of the random times and choices.
    """
    generator, rounds, num_trials = random.Random(seed), 0, NUM_TRIALS
    drivers = [start(folder, num_trials)]
    while rounds < ROUNDS:
        time.sleep(generator.uniform(2, max_wait_s))
        if drivers[-1].poll() is None:
            rounds += kill(drivers[-1], generator)
        if drivers[-1].poll() is not None:
            num_trials += EXTENSION * (drivers[-1].returncode == 0)
            assert drivers[-1].returncode in (0, -signal.SIGKILL), (folder / "log").read_text()[-2000:]
            drivers.append(start(folder, num_trials))
    assert drivers[-1].wait(600) == 0, (folder / "log").read_text()[-2000:]
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while left := [found for driver in drivers if (found := processes(driver.pid))]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(1)
    return num_trials


def run_undisturbed(folder: Path, num_trials: int, extended: bool) -> None:
    """Run the same search without kills.

    Args:
        folder: Of the study file and the storage.
        num_trials: To which the other one was extended.
        extended: Whether this one is extended in the same steps: a strategy that pauses trains the best one to its end before.
    """
    for number in range(NUM_TRIALS, num_trials + 1, EXTENSION) if extended else (num_trials,):
        assert start(folder, number).wait(900) == 0


def trials_of(folder: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name="kills", storage=f"sqlite:///{folder}/runs/studies.db").trials


def losses(folder: Path) -> dict[int, float]:
    """Last ``train/loss`` of each trial, as MLflow shows it."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")  # mlflow.set_tracking_uri would reach later drivers
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    numbers = [int(run.info.run_name.split()[-1]) for run in children]
    assert sorted(numbers) == list(range(len(numbers))), "one run a trial"
    return {number: run.data.metrics["train/loss"] for number, run in zip(numbers, children, strict=True)}


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("strategy", ["asha", "auto"])
@pytest.mark.parametrize(("kill", "max_wait_s"), [(kill_worker, 30), (kill_driver, 45)])  # a driver takes long to start
def test_a_search_with_random_kills_ends_like_an_undisturbed_one(
    tmp_path: Path, kill: Kill, max_wait_s: float, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"workers_per_trial": 2, "startup_trials": 4, "strategy": strategy, "retries": 20}
    space = {"masking.ratio": {"float": [0.3, 0.7]}, "optim.lr": {"float": [1e-4, 1e-2], "log": True}}
    content = yaml.safe_dump({"base": SMALL, "space": space, "search": settings})
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for folder in (killed, undisturbed):
        folder.mkdir()
        (folder / "kills.yaml").write_text(content)
    num_trials = run_with_kills(killed, kill, max_wait_s, seed=0)
    run_undisturbed(undisturbed, num_trials, extended=strategy == "auto")

    found, expected = trials_of(killed), trials_of(undisturbed)
    states = Counter(status_of(trial).value for trial in found)
    shown = losses(killed)
    difference = max(abs(shown[number] - loss) for number, loss in losses(undisturbed).items())
    resumptions = sum(len(assignments(trial)) - 1 for trial in found)
    row = {
        "strategy": strategy,
        "kill": kill.__name__,
        "kills": ROUNDS,
        "trials": num_trials,
        "complete": states["COMPLETE"],
        "pruned": states["PRUNED"],
        "paused": states["PAUSED"],
        "resumptions": resumptions,
        "running": states["RUNNING"],
        "failed": states["FAIL"],
        "duplicates": len(found) - len({str(trial.params) for trial in found}),
        "mlflow runs": len(shown),
        "loss difference": difference,
    }
    with capsys.disabled():
        sys.stdout.write("\n" + "".join(f"{name:>15}  {value}\n" for name, value in row.items()))
    assert len(found) == num_trials == len(shown)
    assert strategy != "auto" or resumptions > 0
    assert set(states) <= {"COMPLETE", "PAUSED" if strategy == "auto" else "PRUNED"} and row["duplicates"] == 0
    assert [trial.params for trial in found] == [trial.params for trial in expected]
    assert [trial.state for trial in found] == [trial.state for trial in expected]
    assert [trial.intermediate_values for trial in found] == [trial.intermediate_values for trial in expected]
    assert list(map(assignments, found)) == list(map(assignments, expected))
    assert difference == 0
