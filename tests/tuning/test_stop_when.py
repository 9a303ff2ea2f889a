"""A study proposes no further configurations when the best has not improved, or when there is nothing left to gain."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from ray.tune.search import Searcher

from csmae.config import ConfigError
from csmae.study.study import Study, load_study
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import IMPROVEMENT
from csmae.trials.store import TrialStore
from csmae.trials.trial import last_value, status_of
from csmae.tuning.observations import Observations
from csmae.tuning.settings_warnings import settings_warnings
from csmae.tuning.stop_when import MIN_COMPLETE, StopWhen
from tests.study.test_study import assert_rejected, write
from tests.tuning.test_pausing_search import Driver
from tests.tuning.test_pausing_search import make_study as make_pausing_study
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")


class Recorder:
    """Records trials as a search does, and asks after each step whether new ones may be proposed.

    Args:
        folder: Of the database.
        **search: Settings of the search.
    """

    def __init__(self, folder: Path, **search: Any) -> None:
        self.study = make_study(folder, **{"num_trials": 99, "start_from": [], "sampler": "random", **search})
        self.folder = folder
        self.restart()

    def restart(self) -> None:
        """Open the study as a new driver does."""
        self.trial_store = TrialStore(self.study, self.folder)
        self.observations, self.stop_when = Observations(self.trial_store), StopWhen(self.trial_store)

    def reason(self) -> str:
        return self.stop_when.reason(self.observations.views())

    def start(self, until: int = 4) -> optuna.Trial:
        trial = self.trial_store.ask()
        self.study.space.suggest(trial)
        self.trial_store.assign(trial, until, "test")
        return trial

    def complete(self, score: float) -> None:
        trial = self.start()
        self.trial_store.record_epoch(trial, 4, (score,))
        self.trial_store.complete(trial, (score,))

    def pause(self, score: float, trial: optuna.Trial | None = None, epoch: int = 1) -> optuna.Trial:
        if trial is None:
            trial = self.start(epoch)
        else:
            self.trial_store.assign(trial, epoch, "promoted")
        self.trial_store.record_epoch(trial, epoch, (score,))
        self.trial_store.pause(trial, epoch, {})
        return trial


PATIENCE: dict[str, Any] = {"stop_when": {"no_improvement": "3 trials"}}


def test_without_the_setting_nothing_stops_and_nothing_is_recorded(tmp_path: Path) -> None:
    search = Recorder(tmp_path)
    for _ in range(5):
        search.complete(0.5)
    assert not search.reason()
    assert IMPROVEMENT not in search.trial_store.optuna_study.user_attrs


def test_trials_since_the_best_score_improved_are_counted(tmp_path: Path) -> None:
    search, reasons = Recorder(tmp_path, **PATIENCE), []
    for score in (0.3, 0.2, 0.1, 0.4, 0.4, 0.3, 0.39):
        search.complete(score)
        reasons.append(search.reason())
    assert reasons == [""] * 6 + ["no improvement in 3 trials (search.stop_when)"]


@pytest.mark.parametrize("restarts", [False, True])
def test_paused_trials_count_once_and_the_promotion_that_improves_the_best_opens_the_search_again(
    tmp_path: Path, restarts: bool
) -> None:
    search = Recorder(tmp_path, **PATIENCE)
    reasons: list[bool] = []

    def step(score: float, trial: optuna.Trial | None = None, epoch: int = 1) -> optuna.Trial:
        paused = search.pause(score, trial, epoch)
        if restarts:
            search.restart()
        reasons.append(bool(search.reason()))
        return paused

    first, second = step(0.30), step(0.20)
    step(0.25, second, 2)  # looked at before
    step(0.10), step(0.10)  # two further ones, and the second
    assert reasons == [False, False, False, False, True]
    step(0.29, second, 3)
    step(0.33, first, 2)  # the best one is still promoted
    assert reasons[5:] == [True, False]
    for _ in range(3):
        step(0.1)
    assert reasons[7:] == [False, False, True]


def test_a_running_trial_that_leads_improves_the_best_before_it_ends(tmp_path: Path) -> None:
    search = Recorder(tmp_path, **PATIENCE)
    search.complete(0.3)
    running = search.start()
    for score in (0.2, 0.1):
        search.complete(score)
        assert not search.reason()
    search.trial_store.record_epoch(running, 1, (0.5,))
    search.complete(0.2)
    assert not search.reason()


def test_a_best_trial_that_becomes_worse_need_not_be_reached_again(tmp_path: Path) -> None:
    search = Recorder(tmp_path, **PATIENCE)
    peak = search.pause(0.6)
    assert not search.reason()
    search.pause(0.5, peak, 2)
    for score in (0.1, 0.1):
        search.complete(score)
        assert not search.reason()
    search.complete(0.55)  # less than the peak, and yet the best
    assert not search.reason()


def test_failed_trials_do_not_count_and_those_that_violate_a_constraint_are_never_the_best(tmp_path: Path) -> None:
    search = Recorder(tmp_path, constraints={"time/epoch_s": "<= 10"}, **PATIENCE)
    search.complete(0.3)
    for _ in range(3):
        search.trial_store.fail(search.start(), "nan")
        assert not search.reason()
    for number in range(3):
        assert not search.reason(), number
        trial = search.start()
        trial.set_constraint("time/epoch_s", 1.0)
        search.trial_store.record_epoch(trial, 4, (0.9,))
        search.trial_store.complete(trial, (0.9,))
    assert search.reason()


def test_with_several_objectives_a_new_point_of_the_front_is_an_improvement(tmp_path: Path) -> None:
    goals = {"val/f1_mean": "maximize", "cost/flops": "minimize"}
    search, reasons = Recorder(tmp_path, objectives=goals, **PATIENCE), []
    for values in ((0.5, 5.0), (0.5, 5.0), (0.4, 6.0), (0.3, 1.0), (0.2, 2.0), (0.5, 6.0), (0.3, 1.0)):
        trial = search.start()
        search.trial_store.record_epoch(trial, 4, values)
        search.trial_store.complete(trial, values)
        reasons.append(bool(search.reason()))
    assert reasons == [False] * 6 + [True]


def test_a_study_of_an_earlier_run_counts_the_trials_after_the_best_one(tmp_path: Path) -> None:
    search = Recorder(tmp_path)
    for score in (0.1, 0.4, 0.3):
        search.complete(score)
    search = Recorder(tmp_path, **PATIENCE)
    assert not search.reason()
    search.complete(0.2)
    assert not search.reason()
    search.complete(0.2)
    assert search.reason()
    more = Recorder(tmp_path, stop_when={"no_improvement": 4})
    assert not more.reason()


def test_a_study_without_a_score_goes_on(tmp_path: Path) -> None:
    search = Recorder(tmp_path, **PATIENCE)
    for _ in range(5):
        search.trial_store.fail(search.start(), "nan")
    assert not search.reason()


# In a search


class Search:
    """A search of single trials with these scores, confirmed in the end.

    Args:
        folder: Of the database.
        restarts: Whether the driver is killed after every trial.
        **search: Settings of the search.
    """

    def __init__(self, folder: Path, restarts: bool = False, **search: Any) -> None:
        folder.mkdir(exist_ok=True)
        settings: dict[str, Any] = {
            "num_trials": 50,
            "confirm": {"top": 1, "seeds": 2},
            "strategy": "none",
            "sampler": "random",
        }
        self.study, self.folder, self.restarts = make_study(folder, **settings, **search), folder, restarts
        self.searcher, _ = make_searcher(self.study, folder)

    def run(self, score: Callable[[int], float]) -> list[dict[str, Any]]:
        """Train what is proposed until the search ends; scores are a function of the trial's number."""
        done: list[dict[str, Any]] = []
        while isinstance(suggestion := self.searcher.suggest(str(len(done))), dict):
            outcome = result(4, score(suggestion["number"]), finished=True)
            self.searcher.on_trial_complete(str(len(done)), outcome)
            done.append(suggestion)
            if self.restarts:
                self.searcher, _ = make_searcher(self.study, self.folder)
        assert suggestion == Searcher.FINISHED
        return done


@pytest.mark.parametrize("restarts", [False, True])
def test_a_search_ends_early_with_its_reason_and_confirms_the_best(tmp_path: Path, restarts: bool) -> None:
    search = Search(tmp_path, restarts, stop_when={"no_improvement": 4})
    trained = search.run(lambda number: 0.5 if number == 3 else 0.4)
    assert [s["config"]["train"]["seed"] for s in trained] == [0] * 8 + [1, 2]
    assert search.searcher.end_reason == "no improvement in 4 trials (search.stop_when)"
    assert search.run(lambda number: 0.4) == []


def test_a_search_that_has_all_of_its_trials_did_not_end_early(tmp_path: Path) -> None:
    search = Search(tmp_path, stop_when={"no_improvement": 7}, start_from=[])
    whole = make_study(tmp_path, num_trials=8, stop_when={"no_improvement": 7}, strategy="none", sampler="random")
    search.searcher, _ = make_searcher(whole, tmp_path)
    assert len(search.run(lambda number: 0.5)) == 8
    assert search.searcher.end_reason == ""


def test_a_longer_patience_continues_a_search_that_ended(tmp_path: Path) -> None:
    assert len(Search(tmp_path, stop_when={"no_improvement": 4}).run(lambda number: 0.5)) == 7
    assert len(Search(tmp_path, stop_when={"no_improvement": 6}).run(lambda number: 0.5)) == 2


def test_a_search_that_pauses_promotes_its_best_trial_to_the_end_and_ends_alike_after_kills(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_trials": 60, "stop_when": {"no_improvement": 6}}
    whole = Driver(make_pausing_study(tmp_path / "whole", **settings), tmp_path / "whole")
    assert whole.run()
    assert whole.searcher.end_reason.startswith("no improvement in ")
    trials = whole.store.explored()
    assert 7 <= len(trials) < 60
    best = max(trials, key=lambda trial: list(trial.intermediate_values.values())[-1])
    assert status_of(best) is TrialStatus.COMPLETE
    study, pieces, ended = make_pausing_study(tmp_path / "killed", **settings), [], False
    while not ended:
        driver = Driver(study, tmp_path / "killed")
        ended = driver.run(limit=1)
        pieces += driver.pieces
    assert pieces == whole.pieces


# The terminator


def smooth(folder: Path, num: int, noise: float = 0.0, **search: Any) -> Recorder:
    """A study whose score has one maximum in the ratio; later trials are near it."""
    recorder = Recorder(folder, stop_when={"terminator": True}, **search)
    random = np.random.default_rng(0)
    for index in range(num):
        ratio = float(random.uniform(0.3, 0.9)) if index < 20 else float(random.normal(0.6, 0.02))
        recorder.trial_store.enqueue({"masking.ratio": ratio, "masking.strategy": "random"})
        recorder.complete(0.6 - (ratio - 0.6) ** 2 + noise * float(random.normal()))
    return recorder


def test_the_terminator_stops_when_less_than_the_error_of_a_score_can_be_gained(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorder = smooth(tmp_path, MIN_COMPLETE - 1)
        assert not recorder.reason()
        stopped = smooth(tmp_path, 40)
    reason = stopped.reason()
    assert "less than the error of a score over seeds, 0.0060" in reason
    stopped.restart()
    assert stopped.reason() == reason


def test_the_terminator_goes_on_while_the_scores_leave_something_to_gain(tmp_path: Path) -> None:
    assert not smooth(tmp_path, 25, noise=0.1).reason()


def test_the_error_is_that_of_the_confirmations_once_there_are_some(tmp_path: Path) -> None:
    recorder = smooth(tmp_path, 40, confirm={"top": 1, "seeds": 2})
    best = max(recorder.trial_store.explored(), key=last_value)
    confirmation = recorder.trial_store.start_confirmation(best, 1)
    recorder.study.space.suggest(confirmation)
    recorder.trial_store.complete(confirmation, (last_value(best) + 2e-9,))
    recorder.restart()
    assert not recorder.reason()  # seeds hardly matter, so that more trials may still gain something


def test_the_terminator_judges_one_objective(tmp_path: Path) -> None:
    goals = {"val/f1_mean": "maximize", "cost/flops": "minimize"}
    path = write(tmp_path, SPACE, objectives=goals, stop_when={"terminator": True})
    assert_rejected(path, "search.stop_when.terminator judges one objective")


@pytest.mark.parametrize(
    ("space", "search", "line"),
    [
        ({}, {"strategy": "none"}, None),
        ({}, {"strategy": "none", "num_trials": 19}, "never ends this search: it needs 20 trials"),
        ({}, {"strategy": "asha", "num_trials": 40}, "never ends this search: it needs 20 trials"),
        (
            {"masking.ratio": {"float": [0.3, 0.9], "when": {"loss.mim_weight": "> 0"}}},
            {"strategy": "none"},
            "unconditional",
        ),
    ],
)
def test_one_line_says_why_the_terminator_cannot_work(
    tmp_path: Path, space: dict[str, Any], search: dict[str, Any], line: str | None
) -> None:
    settings = {"num_trials": 40, "stop_when": {"terminator": True}, **search}
    study: Study = load_study(write(tmp_path, space or {"masking.ratio": {"float": [0.3, 0.9]}}, **settings))
    lines = [text for text in settings_warnings(study) if "terminator" in text]
    assert len(lines) == (line is not None)
    assert line is None or line in lines[0]


# Settings


@pytest.mark.parametrize("text", ["20 trials", "20trials", 20])
def test_patience_is_a_number_of_trials(tmp_path: Path, text: object) -> None:
    study = make_study(tmp_path, stop_when={"no_improvement": text})
    assert study.search.stop_when is not None and study.search.stop_when.no_improvement == 20
    assert make_study(tmp_path, stop_when={"no_improvement": "1 trial"}).search.stop_when is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"no_improvement": "20 epochs"}, "search.stop_when.no_improvement"),
        ({"no_improvement": 0}, "search.stop_when.no_improvement"),
        ({"no_improvment": 3}, "did you mean 'search.stop_when.no_improvement'?"),
        ({"terminator": 3}, "search.stop_when.terminator"),
    ],
)
def test_a_wrong_condition_is_rejected(tmp_path: Path, value: dict[str, Any], text: str) -> None:
    assert_rejected(write(tmp_path, SPACE, stop_when=value), text)
    with pytest.raises(ConfigError):
        load_study(write(tmp_path, SPACE, stop_when=value))
