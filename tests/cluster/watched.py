"""Watches a search on the hosts from outside, and checks its results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import optuna
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from tests.cluster.lab import ENVIRONMENT, RAY, ROOT, SEARCH, STATE, STORAGE, on_host

FIRST_LOSS = 3
"""Epochs that a trial must have saved before anything is lost, so that a restart from the beginning is noticed."""


class WatchedSearch:
    """A search that runs in `ray exec`, and the epochs that its trials save.

    Args:
        cluster: Ray's cluster file.
        name: Name of the study.
        num_trials: Trials of the study.
        epochs: Epochs of each trial.
    """

    def __init__(self, cluster: str, name: str, num_trials: int = 2, epochs: int = 30) -> None:
        self.name, self.num_trials, self.epochs = name, num_trials, epochs
        self.saved: dict[str, list[int]] = {}
        """By trial, the epochs that were saved in its folder, in the order in which they appeared."""
        settings = f"--name {name} --num-trials {num_trials} --set train.epochs={epochs}"
        self._command = [RAY, "exec", cluster, f"{SEARCH} {settings}"]
        self._log = STATE / f"{name}.log"
        self._lost_at = 0.0
        self.start()

    def start(self) -> None:
        """Run the command, for the first time or again."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def watch(self, seconds: float, what: str, condition: Callable[[], bool]) -> None:
        """Record what the trials save until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}; {self.saved}; {self.log}"
            self._record()
            time.sleep(0.5)

    def watch_for(self, seconds: float) -> None:
        """Record what the trials save for some time."""
        until = time.monotonic() + seconds
        self.watch(seconds + 60, "the end of the time", lambda: time.monotonic() > until)

    def _record(self) -> None:
        for path in (STORAGE / self.name).glob("trials/*/encoder/config.json"):
            epoch, epochs = json.loads(path.read_text())["details"]["epoch"], self.saved.setdefault(path.parts[-3], [])
            if epochs[-1:] != [epoch]:
                epochs.append(epoch)

    def begun(self, num_trials: int = 2) -> None:
        """Wait until so many trials have saved ``FIRST_LOSS`` epochs; the loss follows."""
        self.watch(
            300, "trials that train", lambda: sum(e[-1] >= FIRST_LOSS for e in self.saved.values()) == num_trials
        )
        self._lost_at = time.time()

    def worker_host(self) -> int:
        """The host on which most train workers run, the head excepted."""
        count = "pgrep -fc '^ray::[R]ayTrainWorker'"
        return max((2, 3), key=lambda host: int(on_host(host, count).stdout))

    def ended(self, seconds: float = 600) -> int:
        """Wait until the command ends; returns its exit status."""
        self.watch(seconds, "the end", lambda: self._process.poll() is not None)
        return self._process.returncode

    @property
    def log(self) -> str:
        return self._log.read_text()[-3000:]

    def check(self) -> None:
        """Check that the search ends as one that lost nothing; print how long it took to continue."""
        status, ended_at = self.ended(), time.time()
        assert status == 0, self.log
        numbers, epochs = list(range(self.num_trials)), list(range(1, self.epochs + 1))
        study = optuna.load_study(study_name=self.name, storage=f"sqlite:///{STORAGE}/studies.db")
        assert [(trial.number, trial.state.name) for trial in study.trials] == [(n, "COMPLETE") for n in numbers]
        times = self._times()
        assert {name: list(reported) for name, reported in times.items()} == {f"trial {n}": epochs for n in numbers}
        went_back = {number: saved for number, saved in self.saved.items() if saved != sorted(saved)}
        assert not went_back, f"trials that lost epochs that they had saved: {went_back}"
        pauses = [
            pause for reported in times.values() for pause in pairwise(reported.values()) if pause[1] > self._lost_at
        ]
        last, continued = max(pauses, key=lambda pause: pause[1] - pause[0])
        sys.stderr.write(
            f"\n{self.name}: continues after {continued - self._lost_at:.0f} s (no report for {continued - last:.0f} s), "
            f"ends after {ended_at - self._lost_at:.0f} s\n"
        )

    def _times(self) -> dict[str, dict[int, float]]:
        """By MLflow's run of each trial, when each epoch was reported; each trial has one run, and one run is their parent."""
        client = MlflowClient(f"sqlite:///{STORAGE}/mlflow.db")
        experiment = client.get_experiment_by_name(self.name)
        assert experiment is not None
        runs: list[Run] = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
        expected = sorted([self.name, *(f"trial {number}" for number in range(self.num_trials))])
        assert sorted(run.info.run_name for run in runs) == expected
        assert {run.info.status for run in runs} == {"FINISHED"}
        result = {}
        for run in runs:
            if run.info.run_name != self.name:
                history = client.get_metric_history(run.info.run_id, "train/loss")
                assert len({metric.step for metric in history}) == len(history), "an epoch reported twice"
                result[run.info.run_name] = {m.step: m.timestamp / 1000 for m in sorted(history, key=lambda m: m.step)}
        return result
