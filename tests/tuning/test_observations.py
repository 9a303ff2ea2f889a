"""What a strategy sees: a function of the trial store, whatever happened and however often the search was restarted."""

import random
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from csmae.study.study import Study
from csmae.trial_status import TrialStatus
from csmae.trials.store import TrialStore
from csmae.trials.trial import status_of
from csmae.tuning.observations import Observations
from tests.tuning.test_searcher import make_study

pytestmark = pytest.mark.usefixtures("copied_database")

SPACE = {
    "masking.ratio": {"float": [0.3, 0.9]},
    "model.patch_size": {"choice": [15, 30]},
    "train.epochs": {"int": [4, 9]},
}


def step(store: TrialStore, number: random.Random) -> None:
    """Let something happen to a random trial that a search could do."""
    running = [t for t in store.all_trials() if status_of(t) in (TrialStatus.RUNNING, TrialStatus.PAUSED)]
    if not running or (len(running) < 5 and number.random() < 0.3):
        if number.random() < 0.2:
            store.enqueue({"masking.ratio": 0.4}, starting_point={"masking.ratio": 0.4})
        trial = store.ask()
        store.study.space.suggest(trial)
        store.assign(trial, number.randint(1, 9), "first rung")
        return
    chosen = number.choice(running)
    trial = optuna.Trial(store.optuna_study, chosen._trial_id)
    if status_of(chosen) is TrialStatus.PAUSED:
        store.assign(trial, 9, "promoted") if number.random() < 0.7 else store.stop(trial, "among the worst")
        return
    epoch = max(chosen.intermediate_values, default=0) + 1
    actions: list[Callable[[], object]] = [
        lambda: store.record_epoch(trial, epoch, (number.random(),)),
        lambda: store.record_epoch(trial, epoch, (float("nan"),)),
        lambda: store.pause(trial, epoch, {"time/epoch_s": number.uniform(-1, 1)}),
        lambda: store.complete(trial, (number.random(),)),
        lambda: store.fail(trial, "a reason"),
        lambda: store.cut_short(trial, "the time is over"),
        lambda: store.reject(trial, "a duplicate"),
        lambda: store.start_confirmation(chosen, 1),
    ]
    number.choices(actions, weights=[8, 1, 3, 1, 1, 1, 0.5, 0.5])[0]()


@pytest.mark.parametrize("seed", range(2))
def test_a_restarted_search_sees_what_an_uninterrupted_one_sees(tmp_path: Path, seed: int) -> None:
    study = make_study(tmp_path, SPACE, sampler="random")
    store, number = TrialStore(study, tmp_path), random.Random(seed)
    observations, seen = Observations(store), set()
    for index in range(60):
        step(store, number)
        views = observations.views()
        assert observations.views() is views
        seen |= {view.status for view in views}
        if index % 6 == 5:
            assert views == Observations(TrialStore(study, tmp_path)).views()
    assert seen >= {TrialStatus.RUNNING, TrialStatus.PAUSED, TrialStatus.PRUNED}


def pause_two(study: Study, folder: Path) -> TrialStore:
    store = TrialStore(study, folder)
    for ratio, patch_size in ((0.4, 30), (0.8, 15)):
        store.enqueue({"masking.ratio": ratio, "model.patch_size": patch_size, "train.epochs": 9})
    for score in (0.5, 0.6):
        trial = store.ask()
        study.space.suggest(trial)
        store.assign(trial, 3, "first rung")
        store.record_epoch(trial, 1, (score,))
        store.record_epoch(trial, 2, ())
        store.pause(trial, 3, {"time/epoch_s": score - 0.55, "cost/params": -1.0})
    return store


def test_a_view_holds_the_trials_length_cost_and_progress(tmp_path: Path) -> None:
    search = {"objectives": {"val/f1_mean": "minimize"}, "constraints": {"time/epoch_s": "<= 1"}, "start_from": []}
    store = pause_two(make_study(tmp_path, SPACE, **search), tmp_path)
    first, second = Observations(store).views()
    assert first.point == {"masking.ratio": 0.4, "model.patch_size": 30, "train.epochs": 9}
    assert (first.status, first.epochs, first.trained, first.until) == (TrialStatus.PAUSED, 9, 3, 3)
    assert first.scores == {1: (-0.5,)} and not first.never_stop and first.parent is None
    assert first.violation == 0.0 and second.violation == pytest.approx(0.05)
    assert second.epoch_cost > 1.2 * first.epoch_cost > 0


def test_a_stopped_and_a_failed_trial_stay_visible_and_a_confirmation_and_an_enqueued_trial_are_not(
    tmp_path: Path,
) -> None:
    store = pause_two(make_study(tmp_path, SPACE, start_from=[]), tmp_path)
    observations = Observations(store)
    before = observations.views()
    store.start_confirmation(store.all_trials()[0], 7)
    store.enqueue({"masking.ratio": 0.5})
    assert observations.views() is before
    store.stop(store.paused_trial(0), "the worst")
    store.fail(store.paused_trial(1), "a reason")
    assert [view.status for view in observations.views()] == [TrialStatus.PRUNED, TrialStatus.FAIL]
    store.optuna_study.add_trial(
        optuna.create_trial(value=0.7, intermediate_values={4: 0.7}, user_attrs={"transferred_from": ["other", 3]})
    )
    transferred = observations.views()[-1]
    assert (transferred.status, transferred.trained, transferred.until) == (TrialStatus.TRANSFERRED, 4, 4)
    assert transferred.scores == {4: (0.7,)}
    assert transferred.epochs == 4 and observations.views()[0].epochs == 9
