"""What a decision costs does not grow with the number of paused trials: the database is asked the same few questions."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine

from csmae.trials.attributes import ASSIGNMENTS
from csmae.trials.store import TrialStore
from tests.support.promotion import Promotion
from tests.tuning.test_pausing_search import EPOCHS, Driver, make_study

pytestmark = pytest.mark.usefixtures("copied_database")


def add_paused_trials(store: TrialStore, count: int) -> None:
    """Add trials that have paused after three epochs, with bad scores."""
    paused = [{"from": 0, "until": 3, "reason": "first rung", "paused": 3}]
    for index in range(count):
        values = {"masking.ratio": 0.31 + 1e-5 * index, "masking.strategy": "random"}
        store.optuna_study.add_trial(
            optuna.create_trial(
                state=TrialState.RUNNING,
                params=store.study.space.encode(values),
                distributions={name: store.study.space.domains[name].distribution for name in values},
                intermediate_values=dict.fromkeys((1, 2, 3), -1.0),
                user_attrs={ASSIGNMENTS: paused},
            )
        )


def statements(folder: Path, num_paused: int) -> int:
    """Number of SQL statements of four assignments in a study with paused trials."""
    study = make_study(folder, num_trials=num_paused + 5)
    add_paused_trials(TrialStore(study, folder), num_paused)
    driver, count = Driver(study, folder, Promotion(EPOCHS, reduction=999)), 0
    driver.run(limit=1)

    def note(*_: Any) -> None:
        nonlocal count
        count += 1

    event.listen(Engine, "before_cursor_execute", note)
    try:
        driver.run(limit=4)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(driver.pieces) == 5
    return count


def test_a_decision_asks_the_database_as_often_with_hundreds_of_paused_trials_as_with_a_few(tmp_path: Path) -> None:
    few, many = statements(tmp_path / "few", 5), statements(tmp_path / "many", 200)
    assert few == many < 4 * 60
