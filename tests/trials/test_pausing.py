"""Paused trials in the trial store: they survive restarts, are resumed or stopped, and can win only where nothing is complete."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from csmae.study.study import Study
from csmae.trial_status import TrialStatus
from csmae.trials.leaderboard import leaderboard
from csmae.trials.optuna_private import frozen_trial
from csmae.trials.store import TrialStore
from csmae.trials.trial import assigned_until, assignments, num_epochs, paused_epoch, status_of
from tests.tuning.test_searcher import make_study

pytestmark = pytest.mark.usefixtures("copied_database")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return make_study(tmp_path, start_from=[], sampler="random", num_trials=9)


def trained(store: TrialStore, until: int, *scores: float) -> optuna.Trial:
    """A running trial with these scores."""
    trial = store.ask()
    store.study.space.suggest(trial)
    store.assign(trial, until, "first rung")
    for epoch, score in enumerate(scores, start=1):
        store.record_epoch(trial, epoch, (score,))
    return trial


def paused(store: TrialStore, *scores: float) -> optuna.Trial:
    """A trial that paused after its last score."""
    trial = trained(store, len(scores), *scores)
    store.pause(trial, len(scores), {})
    return trial


def statuses(store: TrialStore) -> list[TrialStatus]:
    return [status_of(trial) for trial in store.all_trials()]


def test_a_paused_trial_stays_paused_after_a_restart_and_an_interrupted_one_resumes(
    study: Study, tmp_path: Path
) -> None:
    store = TrialStore(study, tmp_path)
    paused(store, 0.5)
    trained(store, 3, 0.4, 0.45)
    again = TrialStore(study, tmp_path)
    assert statuses(again) == [TrialStatus.PAUSED, TrialStatus.RUNNING]
    assert again.num_interrupted == 1 and again.next_interrupted().number == 1
    assert [trial.state for trial in again.all_trials()] == [TrialState.RUNNING, TrialState.RUNNING]
    assert len(again.explored()) == 2


def test_an_assignment_resumes_a_paused_trial_and_says_why(study: Study, tmp_path: Path) -> None:
    store = TrialStore(study, tmp_path)
    paused(store, 0.5)
    store.assign(store.paused_trial(0), 3, "best of 3 trials at epoch 1")
    store = TrialStore(study, tmp_path)
    trial = frozen_trial(store.next_interrupted())
    assert status_of(trial) is TrialStatus.RUNNING and paused_epoch(trial) is None
    assert assigned_until(trial, 9) == 3 and assigned_until(trial, 2) == 2
    assert assignments(trial) == [
        {"from": 0, "until": 1, "reason": "first rung", "paused": 1},
        {"from": 1, "until": 3, "reason": "best of 3 trials at epoch 1"},
    ]
    with pytest.raises(AssertionError, match="trial 0 is RUNNING"):
        store.paused_trial(0)


def test_a_stopped_trial_is_pruned_and_says_why(study: Study, tmp_path: Path) -> None:
    store = TrialStore(study, tmp_path)
    paused(store, 0.5)
    store.stop(store.paused_trial(0), "not among the best")
    (trial,) = TrialStore(study, tmp_path).all_trials()
    assert status_of(trial) is TrialStatus.PRUNED and trial.user_attrs["stopped"] == "not among the best"
    assert leaderboard(store.optuna_study).entries == []  # unlike a trial that a budget cut short


def test_epochs_without_scores_are_counted_in_running_and_paused_trials(study: Study, tmp_path: Path) -> None:
    store = TrialStore(study, tmp_path)
    trial = trained(store, 4, 0.5)
    for epoch, values in ((2, ()), (3, (float("nan"),))):
        store.record_epoch(trial, epoch, values)
        assert num_epochs(TrialStore(study, tmp_path).all_trials()[0]) == epoch
    store.pause(trial, 4, {})
    assert num_epochs(store.all_trials()[0]) == 4


def test_paused_trials_can_win_only_as_long_as_none_is_complete(study: Study, tmp_path: Path) -> None:
    store = TrialStore(study, tmp_path)
    for scores in ((0.5,), (0.7,), ()):
        paused(store, *scores) if scores else store.pause(trained(store, 1), 1, {})
    assert [entry.trial.number for entry in leaderboard(store.optuna_study).entries] == [1, 0]
    store.complete(trained(store, 4, 0.1), (0.1,))
    assert [entry.trial.number for entry in leaderboard(store.optuna_study).entries] == [3]


def test_a_paused_trial_that_violates_a_constraint_cannot_win(tmp_path: Path) -> None:
    store = TrialStore(make_study(tmp_path, start_from=[], constraints={"time/epoch_s": "<= 10"}), tmp_path)
    for over in (2.5, 0.0):
        store.pause(trained(store, 1, 0.5 + over), 1, {"time/epoch_s": over})
    board = leaderboard(store.optuna_study)
    assert [entry.trial.number for entry in board.entries] == [1]
    assert board.violated_constraints == {0: ("time/epoch_s",)}
    resumed = store.paused_trial(0)
    store.assign(resumed, 2, "promoted")
    store.pause(resumed, 2, {"time/epoch_s": -1.0})
    assert leaderboard(store.optuna_study).violated_constraints == {}


def test_a_copy_of_another_trial_does_not_count_toward_the_number_of_trials(study: Study, tmp_path: Path) -> None:
    store = TrialStore(study, tmp_path)
    paused(store, 0.5)
    trained(store, 2).set_user_attr("parent", 0)
    assert [trial.number for trial in store.explored()] == [0] and len(store.trials()) == 2
