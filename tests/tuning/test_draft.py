"""Trials before they exist: rejected points, what samplers learn, and how values are stored in Optuna's database."""

import itertools
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from csmae.model.cost import cost
from csmae.storage.layout import DATABASE
from csmae.study.study import load_study
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from csmae.tuning.draft import Rejection, rejections
from tests.study.test_domain import BETAS
from tests.study.test_study import write
from tests.tuning.test_proposals import train_all
from tests.tuning.test_searcher import make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")

WIDE = {
    "model.decoder_depth": {"int": [1, 8]},
    "model.decoder_embed_dim": {"choice": [32, 64, 128, 256]},
    "masking.ratio": {"float": [0.3, 0.9]},
}

SMALL: dict[str, Any] = {"constraints": {"cost/params": "<= 1.35e6"}, "start_from": []}


def all_rejections(trial_store: TrialStore) -> list[Rejection]:
    return [rejection for trial in trial_store.all_trials() for rejection in rejections(trial)]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "nsga2"])
def test_rejected_points_take_no_trial_numbers(tmp_path: Path, sampler: str) -> None:
    study = make_study(tmp_path, WIDE, sampler=sampler, num_trials=6, startup_trials=4, **SMALL)
    trained = train_all(make_searcher(study, tmp_path)[0])
    assert [suggestion["number"] for suggestion in trained] == list(range(6))
    trial_store = TrialStore(study, tmp_path)
    assert len(trial_store.all_trials()) == 6 and all_rejections(trial_store)
    assert all(cost(study.resolve(r.values)).params > 1.35e6 for r in all_rejections(trial_store) if r.violations)


@pytest.mark.parametrize("sampler", ["tpe", "qmc", "nsga2"])
def test_a_search_restarted_after_each_trial_proposes_the_same_points(tmp_path: Path, sampler: str) -> None:
    found = []
    for name, limits in (("one", [7]), ("two", [1] * 7)):
        study = make_study(tmp_path / name, WIDE, sampler=sampler, num_trials=7, startup_trials=3, **SMALL)
        trained = [train_all(make_searcher(study, tmp_path / name)[0], limit) for limit in limits]
        found.append([suggestion["config"] for suggestion in itertools.chain(*trained)])
    assert found[0] == found[1] and len(found[0]) == 7


def test_tpe_learns_from_rejections(tmp_path: Path) -> None:
    counts = {}
    for sampler in ("tpe", "random"):
        study = make_study(tmp_path / sampler, WIDE, sampler=sampler, num_trials=16, startup_trials=3, **SMALL)
        train_all(make_searcher(study, tmp_path / sampler)[0])
        counts[sampler] = len(all_rejections(TrialStore(study, tmp_path / sampler)))
    assert counts["tpe"] < 0.7 * counts["random"]


def test_an_exhausted_space_leaves_no_trial_behind(tmp_path: Path) -> None:
    space = {"masking.strategy": {"choice": ["random", "disjoint"]}}
    study = make_study(tmp_path, space, num_trials=9, sampler="random")
    searcher, _ = make_searcher(study, tmp_path)
    assert len(train_all(searcher)) == 2 and searcher.end_reason
    assert len(TrialStore(study, tmp_path).all_trials()) == 2


def test_a_starting_point_listed_twice_is_one_trial(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=2, start_from=[{}, {"masking.ratio": 0.5}, {"masking.ratio": 0.8}])
    trained = train_all(make_searcher(study, tmp_path)[0])
    assert [(s["number"], s["config"]["masking"]["ratio"]) for s in trained] == [(0, 0.5), (1, 0.8)]


# How values are stored in Optuna's database


def test_stepped_values_are_stored_without_rounding_errors_and_trained_once(tmp_path: Path) -> None:
    space = {"masking.ratio": {"float": [0.25, 0.65], "step": 0.05}}
    study = make_study(tmp_path, space, num_trials=20, startup_trials=3, start_from=[{"masking.ratio": 0.6}])
    trained = train_all(make_searcher(study, tmp_path)[0])
    ratios = [suggestion["config"]["masking"]["ratio"] for suggestion in trained]
    assert sorted(ratios) == [0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65]
    assert [trial.params["masking.ratio"] for trial in TrialStore(study, tmp_path).trials()] == ratios


def test_a_study_whose_stored_steps_have_rounding_errors_resumes(tmp_path: Path) -> None:
    space = {"masking.ratio": {"float": [0.25, 0.65], "step": 0.05}}
    study = make_study(tmp_path, space, num_trials=20, sampler="random", start_from=[{"masking.ratio": 0.6}])
    trial_store = TrialStore(study, tmp_path)
    domains: dict[str, BaseDistribution] = {name: domain.distribution for name, domain in study.space.domains.items()}
    for off, state, values in ((0.6000000000000001, TrialState.COMPLETE, [0.5]), (0.35000000000000003, None, None)):
        trial = optuna.create_trial(
            state=state or TrialState.RUNNING, values=values, params={"masking.ratio": off}, distributions=domains
        )
        trial_store.optuna_study.add_trial(trial)
    searcher, _ = make_searcher(study, tmp_path)
    left = searcher.suggest("left")
    assert isinstance(left, dict) and left["config"]["masking"]["ratio"] == 0.35000000000000003  # as in its checkpoint
    searcher.on_trial_complete("left", result(4, 0.3, finished=True))
    ratios = [suggestion["config"]["masking"]["ratio"] for suggestion in train_all(searcher)]
    assert sorted(ratios) == [0.25, 0.3, 0.4, 0.45, 0.5, 0.55, 0.65]  # 0.6 was trained before
    new = load_study(write(tmp_path, space), "new")
    assert (
        transfer_trials(TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "study", new)).num_copied == 9
    )


def test_choices_of_lists_are_trained_and_transferred(tmp_path: Path) -> None:
    space = {**BETAS, "optim.lr": {"float": [0.1, 1], "when": {"optim.betas": [0.9, 0.999]}}}
    search: dict[str, Any] = {"num_trials": 8, "startup_trials": 2, "start_from": [{"optim.betas": [0.9, 0.99]}]}
    old = load_study(write(tmp_path, space, **search), "old")
    trained = train_all(make_searcher(old, tmp_path)[0])
    assert trained[0]["config"]["optim"]["betas"] == [0.9, 0.99]
    assert {str(s["config"]["optim"]["betas"]) for s in trained} == {"[0.9, 0.95]", "[0.9, 0.999]", "[0.9, 0.99]"}
    again, _ = make_searcher(load_study(write(tmp_path, space, **search | {"num_trials": 9}), "old"), tmp_path)
    suggestion = again.suggest("a")
    assert isinstance(suggestion, dict) and suggestion["number"] == len(trained)
    new = load_study(write(tmp_path, space), "new")
    assert transfer_trials(
        TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "old", new)
    ).num_copied == len(trained)
