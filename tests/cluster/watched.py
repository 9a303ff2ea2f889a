"""A search over the hosts that is watched from outside, and what is left of it in the end."""

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
"""Epochs that a trial must have saved before anything is lost: one that began anew would be seen."""


class WatchedSearch:
    """A search that runs by `ray exec`, and the epochs that its trials save.

    Args:
        cluster: Ray's file of the cluster.
        name: Of the study.
        num_trials: Of the study.
        epochs: Of each trial.
    """

    def __init__(self, cluster: str, name: str, num_trials: int = 2, epochs: int = 30) -> None:
        self.name, self.num_trials, self.epochs = name, num_trials, epochs
        self.saved: dict[str, list[int]] = {}
        """By trial, the epoch of what lay in its folder, each time it was another one."""
        settings = f"--name {name} --num-trials {num_trials} --set train.epochs={epochs}"
        self._command = [RAY, "exec", cluster, f"{SEARCH} {settings}"]
        self._log = STATE / f"{name}.log"
        self._lost_at = 0.0
        self.start()

    def start(self) -> None:
        """Run the command, or run it again."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def watch(self, seconds: float, happens: str, condition: Callable[[], bool]) -> None:
        """Note what the trials save until something happens."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {happens}; {self.saved}; {self.log}"
            self._note()
            time.sleep(0.5)

    def watch_for(self, seconds: float) -> None:
        """Note what the trials save for so long."""
        until = time.monotonic() + seconds
        self.watch(seconds + 60, "some time", lambda: time.monotonic() > until)

    def _note(self) -> None:
        for path in (STORAGE / self.name).glob("trials/*/encoder/config.json"):
            epoch, epochs = json.loads(path.read_text())["details"]["epoch"], self.saved.setdefault(path.parts[-3], [])
            if epochs[-1:] != [epoch]:
                epochs.append(epoch)

    def begun(self, num_trials: int = 2) -> None:
        """Wait until so many trials have saved enough for a loss, which follows."""
        self.watch(300, "trials at work", lambda: sum(e[-1] >= FIRST_LOSS for e in self.saved.values()) == num_trials)
        self._lost_at = time.time()

    def worker_host(self) -> int:
        """The host, not the head, on which most processes train."""
        count = "pgrep -fc '^ray::[R]ayTrainWorker'"
        return max((2, 3), key=lambda host: int(on_host(host, count).stdout))

    def ended(self, seconds: float = 600) -> int:
        """Wait for the command's exit status."""
        self.watch(seconds, "the end", lambda: self._process.poll() is not None)
        return self._process.returncode

    @property
    def log(self) -> str:
        return self._log.read_text()[-3000:]

    def check(self) -> None:
        """The search ends as one that lost nothing; tell how long it took to go on."""
        status, ended_at = self.ended(), time.time()
        assert status == 0, self.log
        numbers, epochs = list(range(self.num_trials)), list(range(1, self.epochs + 1))
        study = optuna.load_study(study_name=self.name, storage=f"sqlite:///{STORAGE}/studies.db")
        assert [(trial.number, trial.state.name) for trial in study.trials] == [(n, "COMPLETE") for n in numbers]
        times = self._times()
        assert {name: list(course) for name, course in times.items()} == {f"trial {n}": epochs for n in numbers}
        back = {number: seen for number, seen in self.saved.items() if seen != sorted(seen)}
        assert not back, f"trials that went back behind what they had saved: {back}"
        pauses = [pause for course in times.values() for pause in pairwise(course.values()) if pause[1] > self._lost_at]
        last, went_on = max(pauses, key=lambda pause: pause[1] - pause[0])
        sys.stderr.write(
            f"\n{self.name}: goes on after {went_on - self._lost_at:.0f} s (told nothing for {went_on - last:.0f} s), "
            f"ends after {ended_at - self._lost_at:.0f} s\n"
        )

    def _times(self) -> dict[str, dict[int, float]]:
        """By MLflow's run of each trial, when each epoch was told; there is one run a trial and one above them."""
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
                told = client.get_metric_history(run.info.run_id, "train/loss")
                assert len({metric.step for metric in told}) == len(told), "an epoch told twice"
                result[run.info.run_name] = {m.step: m.timestamp / 1000 for m in sorted(told, key=lambda m: m.step)}
        return result
