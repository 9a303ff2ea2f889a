"""The storage of the only writer returns what the database holds, whatever was written, and reads unchanged trials once."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from csmae.trials.database import load_studies
from csmae.trials.optuna_private import frozen_trial
from csmae.trials.store import TrialStore
from tests.tuning.test_searcher import make_study


def shown(trial: FrozenTrial) -> str:
    """All of a trial as text, in which NaN equals NaN."""
    parts = {name.lstrip("_"): value for name, value in sorted(vars(trial).items())}
    return repr({name: sorted(value.items()) if isinstance(value, dict) else value for name, value in parts.items()})


def suggest(store: TrialStore, trial: optuna.Trial, number: random.Random) -> None:
    if not frozen_trial(trial).params:
        store.study.space.suggest(trial)


ACTIONS: list[Callable[[TrialStore, optuna.Trial, random.Random], Any]] = [
    suggest,
    lambda store, trial, number: store.record_epoch(trial, number.randint(1, 50), (number.random(),)),
    lambda store, trial, number: trial.report(float("nan"), 51),
    lambda store, trial, number: trial.set_user_attr(number.choice("ab"), [number.random(), ("x", None)]),
    lambda store, trial, number: trial.set_constraint(f"metric {number.randint(0, 99)}", float("inf")),
    lambda store, trial, number: store.optuna_study.set_user_attr(number.choice("ab"), number.random()),
    lambda store, trial, number: store.enqueue({"masking.ratio": 0.4}, source=number.random()),
    lambda store, trial, number: store.prune(trial),
    lambda store, trial, number: store.complete(trial, (0.1,)),
    lambda store, trial, number: store.fail(trial, "a reason"),
    lambda store, trial, number: store.cut_short(trial, "the time is over"),
]


@pytest.mark.usefixtures("copied_database")
@pytest.mark.filterwarnings("ignore:The constraint value is ignored", "ignore:The reported value is ignored")
@pytest.mark.parametrize("seed", range(4))
def test_the_storage_returns_what_is_in_the_database_after_any_writes(tmp_path: Path, seed: int) -> None:
    number = random.Random(seed)
    store = TrialStore(make_study(tmp_path, sampler="random", start_from=[]), tmp_path)
    running = [store.ask(), store.ask()]
    for _ in range(25):
        trial = number.choice(running)
        number.choice(ACTIONS)(store, trial, number)
        if frozen_trial(trial).state is not TrialState.RUNNING:
            running.remove(trial)
            running.append(store.ask())
        (stored,) = load_studies(store.path).values()
        assert list(map(shown, store.all_trials())) == list(map(shown, stored.get_trials(deepcopy=False)))
        assert store.optuna_study.user_attrs == stored.user_attrs


@pytest.mark.usefixtures("copied_database")
def test_only_a_trial_that_was_written_is_another_object_afterwards(tmp_path: Path) -> None:
    store = TrialStore(make_study(tmp_path, sampler="random", start_from=[]), tmp_path)
    first, second = store.ask(), store.ask()
    before = store.all_trials()
    store.record_epoch(second, 1, (0.5,))
    after = store.all_trials()
    assert after[0] is before[0] and after[1] is not before[1]
    assert before[1].intermediate_values == {} and after[1].intermediate_values == {1: 0.5}
    frozen_trial(first).user_attrs["changed"] = True
    assert store.all_trials()[0].user_attrs == {}
