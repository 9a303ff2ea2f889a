"""Confirmation: the best trials are repeated with other seeds, and a budget may end that at any time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher
from rich.console import Console

from csmae.console.progress import SearchProgress
from csmae.console.tables import format_studies
from csmae.storage.layout import DATABASE
from csmae.study.study import Study, load_study
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import transfer_trials
from csmae.tuning.champion import encoders_to_score
from csmae.tuning.draft import Draft
from csmae.tuning.events import SearchEvent
from csmae.tuning.searcher import StudySearcher
from tests.study.test_study import BASE, write
from tests.tuning.test_searcher import make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")

SETTINGS: dict[str, Any] = {"sampler": "random", "strategy": "none", "start_from": []}


def train(searcher: StudySearcher, scores: list[float | None]) -> list[dict[str, Any]]:
    """Train what is proposed, one after the other, to the given scores; None is a trial that fails."""
    done = []
    for index, score in enumerate(scores):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict), f"nothing is proposed after {index} trials"
        (Path(suggestion["run_dir"]) / "encoder").mkdir(parents=True, exist_ok=True)
        outcome = {"failed": "nan", "done": True} if score is None else result(4, score, finished=True)
        searcher.on_trial_complete(str(index), outcome)
        done.append(suggestion)
    return done


def confirmed(
    folder: Path, scores: list[float | None], num_trials: int = 3, top: int = 2, seeds: int = 2
) -> TrialStore:
    """A study after these trainings, of which those after ``num_trials`` are confirmations; then its budget ends."""
    study = make_study(folder, num_trials=num_trials, confirm={"top": top, "seeds": seeds, "race": False}, **SETTINGS)
    searcher, _ = make_searcher(study, folder)
    train(searcher, scores)
    return TrialStore(study, folder)


def champion(trial_store: TrialStore) -> int:
    found = encoders_to_score(trial_store)[-1].trial
    assert found is not None
    return found.number


@pytest.mark.parametrize(
    ("confirmations", "best"),
    [
        ([], 1),
        ([0.2], 0),  # the confirmation disproves trial 1, trial 0 is not confirmed yet
        ([0.59], 1),
        ([0.2, 0.1], 1),  # both disappoint, trial 1 less
        ([0.45, 0.55, 0.46], 0),  # the first again, which makes it worse still
        ([0.55, 0.2], 1),
        ([None, 0.2], 1),  # a confirmation that failed does not count
        ([0.4, 0.55, 0.4, 0.54], 0),
    ],
)
def test_a_budget_that_ends_the_confirmation_leaves_the_best_mean_so_far_as_champion(
    tmp_path: Path, confirmations: list[float | None], best: int
) -> None:
    trial_store = confirmed(tmp_path, [0.55, 0.6, 0.3, *confirmations])
    assert champion(trial_store) == best


def test_a_trial_that_is_not_a_finalist_does_not_win_by_a_single_score(tmp_path: Path) -> None:
    trial_store = confirmed(tmp_path, [0.5, 0.6, 0.49, 0.3, 0.3, 0.3, 0.3])
    assert [s.trial.number for s in leaderboard(trial_store.optuna_study).entries] == [1, 0, 2]


@pytest.mark.parametrize(("later", "best"), [({}, 0), ({"confirm": None}, 4)])
def test_finalists_come_before_better_trials_only_while_the_study_confirms(
    tmp_path: Path, later: dict[str, Any], best: int
) -> None:
    confirmed(tmp_path, [0.5, 0.45, 0.5, 0.3], num_trials=2, top=2, seeds=1)
    study = make_study(tmp_path, num_trials=5, keep=1, **{"confirm": {"top": 1, "seeds": 1}, **SETTINGS, **later})
    searcher, _ = make_searcher(study, tmp_path)
    suggestions = [searcher.suggest(str(index)) for index in range(3)]
    for index, score in enumerate((0.55, 0.4, 0.45)):
        suggestion = suggestions[index]
        assert isinstance(suggestion, dict)
        (Path(suggestion["run_dir"]) / "encoder").mkdir(parents=True)
        searcher.on_trial_complete(str(index), result(4, score, finished=True))
    trial_store = TrialStore(study, tmp_path)
    first = leaderboard(trial_store.optuna_study).entries[0]
    assert (first.trial.number, first.mean) == ((0, 0.5) if best == 0 else (4, 0.55))


def test_without_confirmation_trials_compare_by_their_means_and_the_best_keeps_its_encoder(tmp_path: Path) -> None:
    confirmed(tmp_path, [0.6, 0.5, 0.2, 0.5], num_trials=2, top=2, seeds=1)
    study = make_study(tmp_path, num_trials=4, keep=1, **SETTINGS)
    searcher, _ = make_searcher(study, tmp_path)
    train(searcher, [0.55, 0.45])
    trial_store = TrialStore(study, tmp_path)
    entries = leaderboard(trial_store.optuna_study).entries
    assert [(s.trial.number, s.mean) for s in entries] == [(4, 0.55), (1, 0.5), (5, 0.45), (0, 0.4)]
    assert champion(trial_store) == 4


def test_every_finalist_is_repeated_once_before_one_is_repeated_twice(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=2, confirm={"top": 2, "seeds": 2, "race": False}, **SETTINGS)
    searcher, _ = make_searcher(study, tmp_path)
    trained = train(searcher, [0.5, 0.6, 0.5, 0.5, 0.5, 0.5])
    assert [s["config"]["train"]["seed"] for s in trained] == [0, 0, 1, 1, 2, 2]
    ratios = [s["config"]["masking"]["ratio"] for s in trained]
    assert ratios[2:] == [ratios[1], ratios[0]] * 2


def test_a_confirmation_that_a_budget_cut_short_is_repeated_when_the_study_resumes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_trials": 1, "confirm": {"top": 1, "seeds": 1}, **SETTINGS}
    study = make_study(tmp_path, **settings)
    searcher, _ = make_searcher(study, tmp_path)
    train(searcher, [0.5])
    searcher.suggest("cut")
    searcher.on_trial_result("cut", result(1, 0.4))
    searcher.cut_short_trials("the time limit of 1s is reached")
    assert leaderboard(TrialStore(study, tmp_path).optuna_study).entries[0].scores == (0.5,)
    again, _ = make_searcher(study, tmp_path)
    train(again, [0.3])
    assert again.suggest("more") == Searcher.FINISHED
    assert leaderboard(TrialStore(study, tmp_path).optuna_study).entries[0].scores == (0.5, 0.3)


# What others make of it


def test_optunas_own_best_trial_is_never_a_confirmation(tmp_path: Path) -> None:
    trial_store = confirmed(tmp_path, [0.5, 0.6, 0.3, 0.9, 0.2])
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/{DATABASE}")
    assert (study.best_trial.number, study.best_value) == (1, 0.6)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3 + ["PRUNED"] * 2
    assert leaderboard(trial_store.optuna_study).entries[0].scores == (0.6, 0.9)


def test_samplers_do_not_see_confirmations(tmp_path: Path) -> None:
    trial_store = confirmed(tmp_path, [0.5, 0.6, 0.3, 0.9, 0.2])
    seen = Draft(trial_store.study, trial_store.optuna_study, trial_store.all_trials())._observations()
    assert [trial.number for trial in seen] == [0, 1, 2]


def test_the_live_view_and_the_list_of_studies_name_the_champion(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=3, confirm={"top": 2, "seeds": 1}, **SETTINGS)
    budget = Budget(TrialStore(study, tmp_path))
    progress, best = SearchProgress(budget), []

    def listen(event: SearchEvent) -> None:
        if progress.update(event) and progress.best:
            best.append(progress.best.number)

    train(StudySearcher(budget, listen, lambda: 1), [0.55, 0.6, 0.3, 0.2, 0.5])
    assert best == [0, 1, 0]
    assert progress.counts == {"COMPLETE": 5}
    later = SearchProgress(Budget(TrialStore(study, tmp_path))).best
    assert later is not None
    assert later.number == champion(TrialStore(study, tmp_path)) == 0
    assert later.value == pytest.approx(0.525)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(format_studies(tmp_path / DATABASE))
    assert console.export_text().splitlines()[-1].split() == ["study", "5", *3 * ["0"], "0.525", "val/f1_mean"]


def test_a_fork_transfers_a_confirmation_as_an_ordinary_trial(tmp_path: Path) -> None:
    old = confirmed(tmp_path, [0.5, 0.6, 0.3, 0.9], top=1, seeds=1).optuna_study
    space = {"masking.ratio": {"float": [0.1, 0.95]}, "train.seed": {"int": [0, 5]}}
    base = {**BASE, "masking": {"strategy": old.trials[1].params["masking.strategy"]}}
    new = TrialStore(load_study(write(tmp_path, space, base=base), "new"), tmp_path)
    transfer_trials(new, old)
    taken = [trial for trial in new.all_trials() if trial.state.name == "COMPLETE"]
    assert {trial.params["train.seed"] for trial in taken if trial.value == 0.6} == {0}
    assert {trial.params["train.seed"] for trial in taken if trial.value == 0.9} == {1}


# Where the space varies the seed


def seeded(folder: Path, num_trials: int, seeds: int) -> Study:
    space = {"train.seed": {"int": [0, 3]}, "masking.ratio": {"choice": [0.4, 0.5]}}
    starts = [{"train.seed": seed, "masking.ratio": 0.5} for seed in range(num_trials)]
    settings = {**SETTINGS, "start_from": starts, "confirm": {"top": 1, "seeds": seeds}}
    return make_study(folder, space, num_trials=num_trials, **settings)


def test_confirmations_have_unused_seeds_if_the_space_varies_the_seed(tmp_path: Path) -> None:
    study = seeded(tmp_path, num_trials=3, seeds=2)
    searcher, _ = make_searcher(study, tmp_path)
    trained = train(searcher, [0.6, 0.5, 0.4, 0.55, 0.57])
    assert [s["config"]["train"]["seed"] for s in trained] == [0, 1, 2, 3, 4]
    assert leaderboard(TrialStore(study, tmp_path).optuna_study).entries[0].scores == (0.6, 0.55, 0.57)


def test_a_completed_confirmation_proposes_no_further_trial(tmp_path: Path) -> None:
    study = seeded(tmp_path, num_trials=3, seeds=1)
    searcher, _ = make_searcher(study, tmp_path)
    train(searcher, [0.6, 0.5, 0.4, 0.55])
    there = len(TrialStore(study, tmp_path).all_trials())
    for _ in range(5):
        assert searcher.suggest("more") == Searcher.FINISHED
    assert len(TrialStore(study, tmp_path).all_trials()) == there == 4
