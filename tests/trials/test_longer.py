"""A study whose ``train.epochs`` grows: its trials continue under their numbers, and nothing is lost if the driver is killed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine

from csmae.config import ConfigError
from csmae.storage.layout import DATABASE
from csmae.study.study import Study, load_study
from csmae.trial_status import TrialStatus
from csmae.trials.growth import former_champion
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from csmae.trials.trial import assignments, curve, last_values, num_epochs, status_of
from csmae.tuning.observations import Observations
from tests.study.test_study import BASE, write
from tests.trials.test_confirmation import SETTINGS, train
from tests.tuning.test_searcher import SPACE, make_searcher, result

pytestmark = pytest.mark.usefixtures("copied_database")


def make_study(folder: Path, epochs: int = 4, name: str = "study", **search: Any) -> Study:
    base = {**BASE, "train": {"epochs": epochs}}
    return load_study(write(folder, SPACE, base, **{"num_trials": 3, **SETTINGS, **search}), name)


def trained(folder: Path, scores: list[float | None], **search: Any) -> TrialStore:
    """A study of trials with 4 epochs that were trained to these scores, or failed."""
    study = make_study(folder, **search)
    train(make_searcher(study, folder)[0], scores)
    return TrialStore(study, folder)


def statuses(trial_store: TrialStore) -> list[str]:
    return [status_of(trial).name for trial in trial_store.all_trials()]


def numbers(trial_store: TrialStore) -> list[int]:
    """The leaderboard, best first."""
    return [entry.trial.number for entry in leaderboard(trial_store.optuna_study).entries]


def test_complete_trials_are_paused_after_their_last_epoch(tmp_path: Path) -> None:
    before = trained(tmp_path, [0.4, None, 0.6]).all_trials()
    trial_store = TrialStore(make_study(tmp_path, 8), tmp_path)
    assert statuses(trial_store) == ["PAUSED", "FAIL", "PAUSED"]
    after = trial_store.all_trials()
    assert [(t.number, t.params, curve(t)) for t in after] == [(t.number, t.params, curve(t)) for t in before]
    assert [num_epochs(trial) for trial in after] == [4, 0, 4]
    assert assignments(after[0])[-1]["paused"] == 4 and after[0].datetime_complete is None and after[0].values is None
    assert trial_store.shorter_epochs == 4 and len(trial_store.explored()) == 3
    views = Observations(trial_store).views()
    assert [(view.trained, view.epochs, view.status) for view in views if view.number != 1] == 2 * [
        (4, 8, TrialStatus.PAUSED)
    ]
    again = TrialStore(make_study(tmp_path, 8), tmp_path)
    assert statuses(again) == ["PAUSED", "FAIL", "PAUSED"] and again.shorter_epochs is None
    assert again.optuna_study.user_attrs["base"]["train"]["epochs"] == 8
    assert again.num_interrupted == 0


def complete(trial_store: TrialStore, number: int, score: float, epochs: int) -> None:
    """Train a paused trial to its end."""
    trial = trial_store.paused_trial(number)
    trial_store.assign(trial, epochs, "best so far")
    trial_store.record_epoch(trial, epochs, (score,))
    trial_store.complete(trial, (score,))


def test_trials_that_were_complete_compare_by_their_last_scores_until_one_is_complete_again(tmp_path: Path) -> None:
    trained(tmp_path, [0.4, 0.6, 0.5])
    trial_store = TrialStore(make_study(tmp_path, 8), tmp_path)
    paused = trial_store.ask()
    trial_store.study.space.suggest(paused)
    trial_store.assign(paused, 1, "first rung")
    trial_store.record_epoch(paused, 1, (0.9,))
    trial_store.pause(paused, 1, {})
    assert numbers(trial_store) == [1, 2, 0], "a trial that never was complete does not lead"
    running = trial_store.paused_trial(0)
    trial_store.assign(running, 8, "")
    trial_store.record_epoch(running, 5, (0.7,))
    assert numbers(trial_store) == [0, 1, 2], "the last score counts"
    complete(trial_store, 2, 0.55, 8)
    assert numbers(trial_store) == [2]
    trial_store = TrialStore(make_study(tmp_path, 16), tmp_path)
    assert numbers(trial_store) == [2], "trial 2 was trained to more epochs than the others"
    complete(trial_store, 2, 0.6, 16)
    assert trial_store.all_trials()[2].values == [0.6] and curve(trial_store.all_trials()[2])[4] == (0.5,)


def test_constraints_are_measured_again(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=1, constraints={"time/epoch_s": "<= 10"})
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True, **{"metrics/time/epoch_s": 12.0}))
    longer = make_study(tmp_path, 8, num_trials=1, constraints={"time/epoch_s": "<= 10"})
    trial_store = TrialStore(longer, tmp_path)
    assert leaderboard(trial_store.optuna_study).violated_constraints == {0: ("time/epoch_s",)}
    assert numbers(trial_store) == []
    trial = trial_store.paused_trial(0)
    trial.set_constraint("time/epoch_s", -1.0)
    assert trial_store.all_trials()[0].constraints == {"time/epoch_s": -1.0}
    complete(trial_store, 0, 0.5, 8)
    assert numbers(trial_store) == [0]


def test_confirmations_of_shorter_trainings_no_longer_count_and_the_champion_stays(tmp_path: Path) -> None:
    confirm = {"top": 2, "seeds": 2}
    trial_store = trained(tmp_path, [0.4, 0.6, 0.5, 0.3, 0.45], confirm=confirm)
    left, _ = make_searcher(trial_store.study, tmp_path)
    left.suggest("confirmation")  # which the driver's end interrupts
    trial_store.record_champion(2, 0.475, 2)
    assert numbers(trial_store) == [2, 1, 0] and former_champion(trial_store.optuna_study) is None
    trial_store = TrialStore(make_study(tmp_path, 8, confirm=confirm), tmp_path)
    assert statuses(trial_store) == [*3 * ["PAUSED"], *3 * ["PRUNED"]] and trial_store.num_interrupted == 0
    assert numbers(trial_store) == [1, 2, 0]
    assert not [entry for entry in leaderboard(trial_store.optuna_study).entries if entry.is_finalist]
    assert former_champion(trial_store.optuna_study) == 2
    complete(trial_store, 0, 0.7, 8)
    assert former_champion(trial_store.optuna_study) is None and numbers(trial_store) == [0]


def test_several_objectives_keep_their_curves(tmp_path: Path) -> None:
    goals = {"val/f1_mean": "maximize", "cost/params": "minimize"}
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=1, objectives=goals), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True, **{"metrics/cost/params": 5.0}))
    (trial,) = TrialStore(make_study(tmp_path, 8, num_trials=1, objectives=goals), tmp_path).all_trials()
    assert status_of(trial) is TrialStatus.PAUSED and last_values(trial) == (0.4, 5.0)


def test_transferred_trials_keep_the_scores_that_they_had(tmp_path: Path) -> None:
    trained(tmp_path, [0.4, 0.6, 0.5])
    new = make_study(tmp_path, name="new")
    transfer_trials(TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "study", new))
    trial_store = TrialStore(make_study(tmp_path, 8, "new"), tmp_path)
    assert statuses(trial_store) == 3 * ["TRANSFERRED"]
    assert [view.scores for view in Observations(trial_store).views()] == [{4: (0.4,)}, {4: (0.6,)}, {4: (0.5,)}]
    assert trial_store.shorter_epochs == 4 and trial_store.explored() == []


def test_an_interrupted_trial_continues_with_the_longer_training(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    suggestion = searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 0.3))
    again, _ = make_searcher(make_study(tmp_path, 8), tmp_path)
    resumed = again.suggest("a")
    assert isinstance(suggestion, dict) and isinstance(resumed, dict)
    assert resumed["number"] == suggestion["number"] and resumed["config"]["train"]["epochs"] == 8


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        (2, "train.epochs 2 is less than the 3 epochs that trial 0 trained: set it to 4 or more, or use --name NEW"),
        (3, "train.epochs 3 is less than 4, with which trial 0 was trained: set it to 4 or more, or use --name NEW"),
    ],
)
def test_fewer_epochs_are_one_line(tmp_path: Path, epochs: int, text: str) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(3, 0.3))
    with pytest.raises(ConfigError) as caught:
        TrialStore(make_study(tmp_path, epochs), tmp_path)
    assert str(caught.value).startswith(f"study 'study' in {tmp_path / DATABASE}: {text}")
    assert len(str(caught.value).splitlines()) == 1


def test_before_a_trial_was_trained_the_epochs_may_change_either_way(tmp_path: Path) -> None:
    make_searcher(make_study(tmp_path), tmp_path)[0].suggest("a")
    for epochs in (8, 2, 4):
        trial_store = TrialStore(make_study(tmp_path, epochs), tmp_path)
        assert trial_store.optuna_study.user_attrs["definition"]["base"]["train"]["epochs"] == epochs
        assert not any(trial.state is TrialState.COMPLETE for trial in trial_store.all_trials())


def test_epochs_in_the_space_cannot_grow_and_other_changes_are_still_rejected(tmp_path: Path) -> None:
    trained(tmp_path, [0.4, 0.6, 0.5])
    with pytest.raises(
        ConfigError, match=r"with a different definition: base\.optim\.lr was 0\.0001, is 0\.01: use --f"
    ):
        TrialStore(
            load_study(write(tmp_path, SPACE, **SETTINGS), "study", ["train.epochs=8", "optim.lr=0.01"]), tmp_path
        )
    space = {**SPACE, "train.epochs": {"choice": [2, 4]}}
    searcher, _ = make_searcher(load_study(write(tmp_path, space), "varied"), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    wider = {**SPACE, "train.epochs": {"choice": [2, 4, 8]}}
    for changed, texts in ((space, "base.train.epochs was 4, is 8"), (wider, "space.train.epochs was")):
        with pytest.raises(ConfigError, match=texts):
            longer = {**BASE, "train": {"epochs": 8 if changed is space else 4}}
            TrialStore(load_study(write(tmp_path, changed, longer), "varied"), tmp_path)


def states_during_growth(folder: Path) -> list[Path]:
    """What a kill leaves at each commit to the database while ``train.epochs`` grows."""
    trained(folder, [0.4, 0.6, 0.5, 0.3, 0.45], confirm={"top": 2, "seeds": 2})
    states: list[Path] = []

    def keep(connection: object) -> None:
        states.append(folder / f"state-{len(states)}")
        states[-1].mkdir()
        for path in folder.glob(f"{DATABASE}*"):  # with SQLite's journal
            shutil.copy(path, states[-1])

    event.listen(Engine, "commit", keep)
    try:
        TrialStore(make_study(folder, 8, confirm={"top": 2, "seeds": 2}), folder)
    finally:
        event.remove(Engine, "commit", keep)
    return states


def test_growth_survives_a_kill_at_any_commit(tmp_path: Path) -> None:
    def content(trials: list[FrozenTrial]) -> list[Any]:
        return [(status_of(trial), trial.params, curve(trial), trial.values) for trial in trials]

    states = states_during_growth(tmp_path)
    expected = content(TrialStore(make_study(tmp_path, 8, confirm={"top": 2, "seeds": 2}), tmp_path).all_trials())
    assert states and [status for status, *_ in expected] == [*3 * [TrialStatus.PAUSED], *2 * [TrialStatus.PRUNED]]
    for state in states:
        trial_store = TrialStore(make_study(state, 8, confirm={"top": 2, "seeds": 2}), state)
        assert content(trial_store.all_trials()) == expected


def test_a_kill_before_the_growth_is_written_leaves_the_study_as_it_was(tmp_path: Path) -> None:
    first = states_during_growth(tmp_path)[0]
    trial_store = TrialStore(make_study(first, confirm={"top": 2, "seeds": 2}), first)
    assert statuses(trial_store) == 5 * ["COMPLETE"] and numbers(trial_store) == [2, 1, 0]
