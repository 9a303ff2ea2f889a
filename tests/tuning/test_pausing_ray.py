"""Searches on a real Ray whose strategy pauses trials: warm groups take them up again, and a restart changes nothing."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from csmae.cluster.resources import ClusterResources, allocate
from csmae.cluster.session import ray_running
from csmae.study.study import load_study
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.trials.trial import assignments, status_of
from csmae.tuning.driver import run_search
from csmae.tuning.events import Listener, SearchOutcome, TrialEnded, TrialPaused, TrialStarted
from tests.study.test_study import write
from tests.support.promotion import Promotion

EPOCHS = 9

RESOURCES = ClusterResources(((2, 0),), "this machine")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # the workers import the stub from here
    with ray_running(None, RESOURCES, verbose=False):
        yield


def search(
    folder: Path, workers_per_trial: int, listener: Listener = lambda event: None
) -> tuple[TrialStore, SearchOutcome]:
    """Run a study of quick trainings that pause at epochs 1 and 3."""
    folder.mkdir(exist_ok=True)
    base = {"model": {"size": "nano"}, "optim": {"warmup_epochs": 0, "batch_size": 2}, "train": {"epochs": EPOCHS}}
    settings: dict[str, Any] = {"num_trials": 9, "sampler": "random", "start_from": [], "seed": 3}
    space = {"masking.ratio": {"float": [0.3, 0.9]}}
    study = load_study(write(folder, space, base, workers_per_trial=workers_per_trial, **settings))
    store = TrialStore(study, folder)
    training, strategy = "tests.support.stub_training:quick", Promotion(EPOCHS)
    end = run_search(Budget(store), allocate(study.search, RESOURCES), listener, training, strategy)
    return store, end.outcome


def attempts(store: TrialStore, number: int) -> list[list[str]]:
    """For each assignment of a trial, the process that trained it and the epoch from which it resumed."""
    return [line.split(" from ") for line in (store.run_dir(number) / "pids-0").read_text().splitlines()]


def test_paused_trials_resume_from_their_checkpoints_in_any_warm_group(tmp_path: Path) -> None:
    events = Counter[type]()
    store, outcome = search(tmp_path, 1, lambda event: events.update([type(event)]))
    assert outcome is SearchOutcome.COMPLETED
    trials = store.all_trials()
    assert {status_of(trial) for trial in trials} == {TrialStatus.PAUSED, TrialStatus.COMPLETE}
    for trial in trials:
        pieces, found = assignments(trial), attempts(store, trial.number)
        assert [int(start) for _, start in found] == [piece["from"] for piece in pieces]
        assert sorted(trial.intermediate_values) == list(range(1, pieces[-1]["until"] + 1))
        assert trial.user_attrs["worker_s"] > 0
    assert len({pid for number in range(9) for pid, _ in attempts(store, number)}) <= 2
    num_pieces = sum(len(assignments(trial)) for trial in trials)
    assert events[TrialStarted] == num_pieces == events[TrialPaused] + events[TrialEnded]


def test_a_search_that_stops_between_a_pause_and_a_resumption_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    undisturbed, outcome = search(tmp_path / "undisturbed", 2)
    assert outcome is SearchOutcome.COMPLETED
    paused = Counter[int]()

    def stop_at_pauses(event: object) -> None:
        paused.update([event.number] if isinstance(event, TrialPaused) else [])
        if isinstance(event, TrialPaused) and paused.total() in (2, 5, 9):
            os.kill(os.getpid(), signal.SIGINT)

    outcomes: list[SearchOutcome] = []
    while SearchOutcome.COMPLETED not in outcomes:
        store, outcome = search(tmp_path / "stopped", 2, stop_at_pauses)
        outcomes.append(outcome)
    assert outcomes == [SearchOutcome.INTERRUPTED] * 3 + [SearchOutcome.COMPLETED]
    for trial, expected in zip(store.all_trials(), undisturbed.all_trials(), strict=True):
        assert trial.params == expected.params and trial.state is expected.state
        assert trial.intermediate_values == expected.intermediate_values
        assert assignments(trial) == assignments(expected)
