"""Our search on tables: the real searcher and trial store under the simulated clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from curves.clock import Run, Simulation
from curves.ours import Ours, make_study, parse_settings
from optuna.distributions import FloatDistribution

from tests.benchmarks.test_curves import EPOCHS, make_table


def search(method: str, folder: Path, workers: int = 1, database: bool = False, seed: int = 0) -> Run:
    table = make_table()
    ours = Ours(table, parse_settings(method), seed, workers, folder, database)
    return Simulation(table, ours, workers).run()


def test_the_space_of_a_table_has_its_hyperparameters() -> None:
    table = make_table()
    study = make_study(table, {"sampler": "tpe"}, seed=3, workers=1)
    lr, shift = (study.space.domains[name].distribution for name in ("lr", "shift"))
    assert isinstance(lr, FloatDistribution)
    assert isinstance(shift, FloatDistribution)
    assert (lr.low, lr.high, lr.log) == (table.points[:, 0].min(), table.points[:, 0].max(), True)
    assert (shift.low, shift.high, shift.log) == (table.points[:, 1].min(), table.points[:, 1].max(), False)
    assert study.max_epochs == EPOCHS and list(study.starting_points()) == []
    assert study.resolve({"lr": 1e-3, "shift": 0.0}) != study.resolve({"lr": 1e-3, "shift": 1.0})


def test_a_trial_store_in_memory_decides_like_its_database(tmp_path: Path) -> None:
    stored = search("tpe+asha,startup_trials=4", tmp_path / "one", database=True)
    in_memory = search("tpe+asha,startup_trials=4", tmp_path / "two")
    assert stored.improvements == in_memory.improvements and stored.num_decisions == in_memory.num_decisions > 30
    assert (tmp_path / "one" / "studies.db").exists() and not (tmp_path / "two" / "studies.db").exists()


def test_early_stopping_looks_at_more_configurations_in_the_same_budget(tmp_path: Path) -> None:
    complete = search("random+none", tmp_path / "one", workers=4)
    halved = search("random+asha", tmp_path / "two", workers=4)
    assert complete.num_trials < 40 < halved.num_trials
    assert halved.num_finished < complete.num_finished


def test_a_search_outlives_a_table_whose_first_trainings_diverge(tmp_path: Path) -> None:
    table = make_table(num_diverged=240)
    runs = [
        Simulation(table, Ours(table, parse_settings("random+none"), seed, 1, tmp_path / str(seed))).run()
        for seed in range(3)
    ]
    assert np.mean([run.num_finished / run.num_trials for run in runs]) < 0.5
    assert all(run.num_trials > 40 for run in runs)


def test_names_of_methods_are_settings() -> None:
    assert parse_settings("auto") == {"sampler": "auto", "strategy": "auto"}
    assert parse_settings("gp+asha,grace_epochs=3") == {"sampler": "gp", "strategy": "asha", "grace_epochs": "3"}
    for wrong in ("gp", "gp+asha+x", "auto,grace_epochs", ""):
        with pytest.raises(ValueError, match=r"must be auto or SAMPLER\+STRATEGY"):
            parse_settings(wrong)
