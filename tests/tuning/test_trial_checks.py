"""Checks of what trials report: constraints, the first trials, metrics that no epoch reports."""

from pathlib import Path

import pytest

from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.tuning.events import SearchEnd, SearchOutcome
from tests.tuning.test_searcher import make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")


def test_a_trial_that_violates_a_measured_constraint_cannot_win(tmp_path: Path) -> None:
    study = make_study(tmp_path, constraints={"time/epoch_s": "<= 10"}, num_trials=2)
    searcher, _ = make_searcher(study, tmp_path)
    for name, seconds, value in (("a", 5, 0.2), ("b", 50, 0.9)):
        searcher.suggest(name)
        searcher.on_trial_complete(name, result(4, value, finished=True) | {"metrics/time/epoch_s": seconds})
    assert [trial.number for trial in leaderboard(TrialStore(study, tmp_path).optuna_study).ranked] == [0]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_measured_constraint_is_judged_by_the_last_epoch(tmp_path: Path, restarted: bool) -> None:
    study = make_study(tmp_path, constraints={"time/epoch_s": "<= 10"}, num_trials=2)
    searcher, _ = make_searcher(study, tmp_path)
    for name, first, last in (("a", 50, 5), ("b", 5, 50)):
        searcher.suggest(name)
        searcher.on_trial_result(name, result(1, 0.2) | {"metrics/time/epoch_s": first})
        searcher.on_trial_result(name, result(2, 0.2) | {"metrics/time/epoch_s": last})
        if not restarted:
            searcher.on_trial_complete(name, {"done": True})
    if restarted:
        searcher, _ = make_searcher(study, tmp_path)
        searcher.cut_short_trials("the budget is exhausted")
    trials = TrialStore(study, tmp_path).trials()
    assert [trial.constraints["time/epoch_s"] for trial in trials] == [-5, 40]


def test_first_trials_that_fail_alike_abort_the_search(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=9), tmp_path)
    for index in range(3):
        assert searcher.search_end is None
        searcher.suggest(str(index))
        searcher.on_trial_complete(str(index), {"failed": f"OutOfMemoryError on rank {index}", "done": True})
    assert searcher.search_end == SearchEnd(
        SearchOutcome.ABORTED, "the first 3 trials all failed: OutOfMemoryError on rank 2"
    )


def test_failures_do_not_abort_the_search_while_one_of_the_first_trials_runs(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=9), tmp_path)
    for name in "abcd":
        searcher.suggest(name)
    for name in "bcd":  # the base is still in its first epoch
        searcher.on_trial_complete(name, {"failed": "the loss is not finite in epoch 1", "done": True})
    assert searcher.search_end is None
    searcher.on_trial_complete("a", {"failed": "the loss is not finite in epoch 2", "done": True})
    assert searcher.search_end == SearchEnd(
        SearchOutcome.ABORTED, "the first 3 trials all failed: the loss is not finite in epoch 1"
    )


def test_first_trials_that_fail_alike_do_not_abort_the_search_while_another_one_trains(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=9), tmp_path)
    for name in "abcd":
        searcher.suggest(name)
    searcher.on_trial_result("d", result(1, 0.5))
    for name in "abc":
        searcher.on_trial_complete(name, {"failed": "the loss is not finite in epoch 1", "done": True})
    assert searcher.search_end is None


def test_failures_after_a_success_or_for_several_reasons_do_not_abort_the_search(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=9), tmp_path)
    for index, outcome in enumerate(
        ({"failed": "a"}, {"failed": "b"}, {"failed": "a"}, result(1, 0.5), {"failed": "a"})
    ):
        searcher.suggest(str(index))
        searcher.on_trial_complete(str(index), {**outcome, "done": True})
    assert searcher.search_end is None


def test_an_objective_that_no_epoch_reports_aborts_the_search(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, objectives={"val/precision/s1_to_s2": "maximize"}), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.5, finished=True))
    assert searcher.search_end == SearchEnd(SearchOutcome.ABORTED, "no epoch reports 'val/precision/s1_to_s2'")
