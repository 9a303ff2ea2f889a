"""The strategies that pause no trial: none, median, asha and hyperband."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csmae.trial_status import TrialStatus
from csmae.tuning.strategy.base import NewTrial, Resume, Strategy, TrialView
from csmae.tuning.strategy.make import make_strategy
from tests.tuning.test_searcher import make_study


def strategy_of(folder: Path, name: str, **search: Any) -> Strategy:
    return make_strategy(make_study(folder, strategy=name, **search))


def paused(number: int, score: float) -> TrialView:
    return TrialView(number, {}, TrialStatus.PAUSED, epochs=9, trained=1, until=1, scores={1: (score,)})


@pytest.mark.parametrize("name", ["asha", "hyperband", "median", "none"])
def test_every_configuration_is_trained_in_one_go_until_there_are_no_more(tmp_path: Path, name: str) -> None:
    strategy = strategy_of(tmp_path, name)
    assert strategy.next([], 3) == NewTrial(4, "new configuration")
    assert strategy.next([TrialView(0, {}, TrialStatus.RUNNING, epochs=4)], 0) is None
    assert strategy.describe()[0].startswith("Each of 3 configurations is trained in one go")


def test_asha_stops_what_is_not_among_the_best_third_and_none_stops_nothing(tmp_path: Path) -> None:
    for name, expected in (("asha", [True, False, False, True]), ("none", [True] * 4)):
        strategy = strategy_of(tmp_path, name)
        decisions = [strategy.should_continue(number, 1, (score,)) for number, score in enumerate((0.6, 0.5, 0.4, 0.9))]
        assert decisions == expected


def test_paused_trials_of_another_strategy_continue_as_far_as_the_rule_allows(tmp_path: Path) -> None:
    trials = [paused(number, score) for number, score in enumerate((0.5, 0.6, 0.7))]
    for name, resumed in (("asha", 2), ("none", 0)):
        strategy = strategy_of(tmp_path, name)
        for trial in trials:
            strategy.should_continue(trial.number, 1, trial.scores[1])
        assert strategy.next(trials, 0) == Resume(resumed, 9, "not stopped so far")
        assert sorted(strategy.expectation(trials), key=strategy.expectation(trials).__getitem__) == [0, 1, 2]


def test_a_paused_starting_point_continues_whatever_its_scores(tmp_path: Path) -> None:
    strategy = strategy_of(tmp_path, "asha")
    trials = [paused(0, 0.5), replace(paused(1, 0.1), never_stop=True), paused(2, 0.9)]
    for trial in trials:
        strategy.should_continue(trial.number, 1, trial.scores[1])
    assert strategy.next(trials[:2], 0) == Resume(1, 9, "not stopped so far")
