"""What mattered: the importance of each parameter for the first objective."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from csmae.trials.importance import importances
from csmae.trials.optuna_private import continue_trial
from csmae.trials.store import TrialStore
from tests.tuning.test_searcher import make_study

pytestmark = pytest.mark.usefixtures("copied_database")

SPACE = {"masking.ratio": {"float": [0.2, 0.8]}, "optim.lr": {"float": [1e-4, 1e-2], "log": True}}


def filled(folder: Path, outcome: Callable[[float, float], tuple[TrialState, float]], **search: Any) -> TrialStore:
    """A study of sixty random trials; ``outcome`` says from ratio and learning rate how each ended."""
    trial_store = TrialStore(make_study(folder, SPACE, start_from=[], **search), folder)
    random = np.random.default_rng(0)
    for _ in range(60):
        ratio, lr = float(random.uniform(0.2, 0.8)), float(10 ** random.uniform(-4, -2))
        state, value = outcome(ratio, lr)
        complete = state is TrialState.COMPLETE
        trial = optuna.create_trial(
            state=state,
            value=value if complete else None,
            params={"masking.ratio": ratio, "optim.lr": lr},
            distributions={name: domain.distribution for name, domain in trial_store.study.space.domains.items()},
            intermediate_values={4 if complete else 1: value},
        )
        trial_store.optuna_study.add_trial(trial)
    return trial_store


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_important_parameter_is_the_one_that_makes_trials_good(tmp_path: Path, direction: str) -> None:
    sign = 1 if direction == "maximize" else -1

    def outcome(ratio: float, lr: float) -> tuple[TrialState, float]:
        return TrialState.COMPLETE, sign * (0.0 if lr > 5e-3 else 1 - abs(ratio - 0.6))

    trial_store = filled(tmp_path, outcome, objectives={"val/f1_mean": direction})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shares = importances(trial_store.optuna_study)
    assert shares["masking.ratio"] > 0.8
    assert list(shares) == ["masking.ratio", "optim.lr"] and sum(shares.values()) == pytest.approx(1)


def test_trials_that_were_stopped_early_count(tmp_path: Path) -> None:
    def outcome(ratio: float, lr: float) -> tuple[TrialState, float]:
        stopped = abs(ratio - 0.6) > 0.06
        return (TrialState.PRUNED, 0.3 + lr) if stopped else (TrialState.COMPLETE, 0.8 + lr)

    assert importances(filled(tmp_path, outcome).optuna_study)["masking.ratio"] > 0.6


def test_paused_trials_count(tmp_path: Path) -> None:
    trial_store = filled(tmp_path, lambda ratio, lr: (TrialState.RUNNING, 1 - abs(ratio - 0.6)))
    assert importances(trial_store.optuna_study) == {}, "a running trial does not count"
    for trial in trial_store.all_trials():
        paused = continue_trial(trial_store.optuna_study, trial)
        trial_store.assign(paused, 4, "first rung")
        trial_store.pause(paused, 4, {})
    assert importances(trial_store.optuna_study)["masking.ratio"] > 0.8


def test_equal_scores_give_no_importance(tmp_path: Path) -> None:
    assert importances(filled(tmp_path, lambda ratio, lr: (TrialState.COMPLETE, 0.5)).optuna_study) == {}
