"""The searcher on a real trial store: Optuna with SQLite."""

import math
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from csmae.config import Config, ConfigError
from csmae.model.cost import cost
from csmae.storage.layout import DATABASE
from csmae.study.study import Study, load_study
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from csmae.tuning.draft import rejections
from csmae.tuning.events import EpochReported, SearchEvent, TrialEnded, TrialStarted, TrialWaiting
from csmae.tuning.searcher import StudySearcher
from tests.study.test_study import BASE, write

pytestmark = pytest.mark.usefixtures("copied_database")

SPACE = {"masking.ratio": {"float": [0.3, 0.9]}, "masking.strategy": {"choice": ["random", "disjoint"]}}


def make_study(folder: Path, space: dict[str, Any] | None = None, **search: Any) -> Study:
    folder.mkdir(exist_ok=True)
    return load_study(write(folder, space or SPACE, **{"num_trials": 3, **search}))


def make_searcher(study: Study, folder: Path) -> tuple[StudySearcher, list[SearchEvent]]:
    events: list[SearchEvent] = []
    return StudySearcher(Budget(TrialStore(study, folder)), events.append, lambda: 99), events


def result(epoch: int, value: float | None, **more: Any) -> dict[str, Any]:
    score = {} if value is None else {"metrics/val/f1_mean": value}
    return {"epoch": epoch, "metrics/train/loss": 1.0, **score, **more}


def test_the_base_is_the_first_trial_and_is_never_stopped(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(first, dict) and isinstance(second, dict)
    assert first["config"]["masking"] == {"ratio": 0.5, "strategy": "random", "reconstruction": "disjoint"}
    assert (first["never_stop"], second["never_stop"]) == (True, False)
    assert first["run_dir"] == str(tmp_path / "study" / "trials" / "0")


def test_each_outcome_is_recorded_as_its_optuna_state(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=6)
    searcher, events = make_searcher(study, tmp_path)
    for name in "abcdef":
        searcher.suggest(name)
    assert searcher.suggest("g") is None
    searcher.on_trial_result("a", result(1, 0.2))
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    searcher.on_trial_complete("b", result(1, 0.1))
    searcher.on_trial_result("c", result(1, 0.3))
    searcher.on_trial_complete("c", {"failed": "the loss is not finite in epoch 2", "done": True})
    searcher.on_trial_complete("d", result(4, math.nan, finished=True))
    searcher.on_trial_complete("e", result(4, None, finished=True))
    searcher.on_trial_complete("f", error=True)
    once_more = searcher.suggest("g")
    assert isinstance(once_more, dict) and once_more["number"] == 5
    searcher.on_trial_complete("g", error=True)
    assert searcher.suggest("h") == Searcher.FINISHED
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "FAIL", "FAIL"]
    assert trials[0].value == 0.4 and trials[0].intermediate_values == {1: 0.2, 4: 0.4}
    assert trials[1].intermediate_values == {1: 0.1}
    assert trials[2].intermediate_values == {1: 0.3}
    reasons = [trial.user_attrs.get("reason") for trial in trials]
    assert reasons[2] == "the loss is not finite in epoch 2"
    assert reasons[3] == "val/f1_mean was nan at the end"
    assert reasons[4] == "val/f1_mean was not reported"
    assert [event.status for event in events if isinstance(event, TrialEnded)] == [t.state.name for t in trials]


def test_a_trial_without_resources_is_proposed_again_and_counts_once(tmp_path: Path) -> None:
    searcher, events = make_searcher(make_study(tmp_path, num_trials=1), tmp_path)
    first = searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 0.2))
    searcher.on_trial_complete("a", {"unschedulable": "no node has the resources", "done": True})
    assert searcher.suggest("b") == first
    searcher.on_trial_complete("b", result(4, 0.4, finished=True))
    assert searcher.suggest("c") == Searcher.FINISHED
    assert [type(event) for event in events] == [
        TrialStarted,
        EpochReported,
        TrialWaiting,
        TrialStarted,
        EpochReported,
        TrialEnded,
    ]
    (trial,) = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/studies.db").trials
    assert trial.intermediate_values == {1: 0.2, 4: 0.4}


def test_an_epoch_reported_twice_is_recorded_once(tmp_path: Path) -> None:
    searcher, events = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    for epoch in (1, 2, 1, 2, 3):
        searcher.on_trial_result("a", result(epoch, epoch / 10))
    assert [event.epoch for event in events if isinstance(event, EpochReported)] == [1, 2, 3]


def test_a_study_resumes_the_trials_of_a_dead_driver(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    searcher, _ = make_searcher(study, tmp_path)
    left = [searcher.suggest(name) for name in "ab"]
    searcher.on_trial_result("b", result(1, 0.3))
    again, events = make_searcher(study, tmp_path)
    assert [again.suggest(name) for name in "cd"] == left
    assert [event.resumed for event in events if isinstance(event, TrialStarted)] == [True, True]
    again.on_trial_result("d", result(1, 0.3))
    assert not [event for event in events if isinstance(event, EpochReported)]
    third = again.suggest("e")
    assert isinstance(third, dict) and third["number"] == 2
    assert again.suggest("f") is None


def test_a_larger_number_of_trials_extends_a_study(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=1), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    assert searcher.suggest("b") == Searcher.FINISHED
    more, _ = make_searcher(make_study(tmp_path, num_trials=2), tmp_path)
    suggestion = more.suggest("b")
    assert isinstance(suggestion, dict) and suggestion["number"] == 1
    assert more.suggest("c") is None


def test_invalid_and_duplicate_configurations_take_no_trial(tmp_path: Path) -> None:
    space = {"model.embed_dim": {"choice": [96, 128]}, "model.num_heads": {"choice": [3, 4]}}
    base = {"model": {"size": "nano", "embed_dim": 96, "num_heads": 4}}
    study = load_study(write(tmp_path, space, base=base, num_trials=12, sampler="random", seed=7))
    searcher, _ = make_searcher(study, tmp_path)
    models = [s["config"]["model"] for s in (searcher.suggest(str(i)) for i in range(4)) if isinstance(s, dict)]
    assert sorted((m["embed_dim"], m["num_heads"]) for m in models) == [(96, 3), (96, 4), (128, 4)]
    assert searcher.search_end is None
    reasons = {
        rejection.reason for trial in TrialStore(study, tmp_path).all_trials() for rejection in rejections(trial)
    }
    assert "same configuration as trial 0" in reasons
    assert any("3 does not divide 128" in reason for reason in reasons)


def test_a_grid_trains_every_point_once(tmp_path: Path) -> None:
    space = {
        "masking.ratio": {"float": [0.3, 0.9], "step": 0.3},
        "loss.mim_weight": {"choice": [0.0, 1.0]},
        "loss.temperature": {"float": [0.1, 0.3], "step": 0.1, "when": {"loss.mim_weight": "> 0"}},
    }
    study = make_study(tmp_path, space, sampler="grid", num_trials=99, start_from=[])
    searcher, _ = make_searcher(study, tmp_path)
    suggestions = [searcher.suggest(str(index)) for index in range(13)]
    assert suggestions[12] is None
    configs = [s["config"] for s in suggestions if isinstance(s, dict)]
    points = {
        (round(c["masking"]["ratio"], 9), c["loss"]["mim_weight"], round(c["loss"]["temperature"], 9)) for c in configs
    }
    expected = {(r, 1.0, t) for r in (0.3, 0.6, 0.9) for t in (0.1, 0.2, 0.3)} | {
        (r, 0.0, 0.5) for r in (0.3, 0.6, 0.9)
    }
    assert points == expected


def test_constraints_on_cost_are_enforced_without_training(tmp_path: Path) -> None:
    space = {"model.decoder_depth": {"int": [1, 8]}, "masking.ratio": {"float": [0.3, 0.9]}}
    limit = {"cost/params": "<= 1.6e6"}
    searcher, _ = make_searcher(make_study(tmp_path, space, constraints=limit, num_trials=8), tmp_path)
    configs = [s["config"] for s in (searcher.suggest(str(i)) for i in range(8)) if isinstance(s, dict)]
    assert len(configs) == 8 and all(cost(Config.model_validate(c)).params <= 1.6e6 for c in configs)
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/studies.db").trials
    rejected = [rejection for trial in trials for rejection in rejections(trial) if rejection.violations]
    assert rejected and all(rejection.violations["cost/params"] > 0 for rejection in rejected)
    assert all("cost/params is" in rejection.reason for rejection in rejected)


def test_constraints_that_no_point_satisfies_abort_the_search(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, constraints={"cost/params": "<= 10"}), tmp_path)
    assert searcher.suggest("a") == Searcher.FINISHED
    assert searcher.search_end is not None and "must be <= 10" in searcher.search_end.reason


def test_several_objectives_make_a_pareto_front(tmp_path: Path) -> None:
    goals = {"val/f1_mean": "maximize", "cost/flops": "minimize"}
    study = make_study(tmp_path, objectives=goals, num_trials=4)
    searcher, _ = make_searcher(study, tmp_path)
    for index, (score, flops) in enumerate(((0.5, 5.0), (0.6, 6.0), (0.4, 7.0), (0.3, 1.0))):
        searcher.suggest(str(index))
        outcome = result(1, score, finished=True) | {"metrics/cost/flops": flops}
        searcher.on_trial_complete(str(index), outcome)
    trial_store = TrialStore(study, tmp_path)
    assert [trial.number for trial in leaderboard(trial_store.optuna_study).ranked] == [1, 0, 3, 2]
    assert {trial.number for trial in trial_store.optuna_study.best_trials} == {0, 1, 3}
    assert dict(trial_store.curves())[2] == {1: (0.4, 7.0)}


def test_the_best_trials_are_confirmed_with_other_seeds(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=3, confirm={"top": 2, "seeds": 2, "race": False})
    searcher, _ = make_searcher(study, tmp_path)
    for index, score in enumerate((0.5, 0.6, 0.4)):
        searcher.suggest(str(index))
        if index == 2:
            assert searcher.suggest("later") is None
        searcher.on_trial_complete(str(index), result(4, score, finished=True))
    again = [searcher.suggest(f"again {index}") for index in range(5)]
    assert again[4] is None
    configs = [s["config"] for s in again if isinstance(s, dict)]
    assert [config["train"]["seed"] for config in configs] == [1, 1, 2, 2]
    for index, score in enumerate((0.3, 0.55, 0.3, 0.57)):
        searcher.on_trial_complete(f"again {index}", result(4, score, finished=True))
    trial_store = TrialStore(study, tmp_path)
    assert [trial.number for trial in trial_store.explored()] == [0, 1, 2]
    board = leaderboard(trial_store.optuna_study).entries
    assert [(s.trial.number, s.num_seeds) for s in board] == [(0, 3), (1, 3), (2, 1)]
    assert board[0].mean == pytest.approx(0.54) and board[0].spread == pytest.approx(0.0361, abs=1e-3)


def test_trials_that_fit_are_transferred_from_another_study(tmp_path: Path) -> None:
    old = load_study(write(tmp_path, SPACE, num_trials=4, sampler="random"), "old")
    searcher, _ = make_searcher(old, tmp_path)
    for index in range(4):
        searcher.suggest(str(index))
        searcher.on_trial_complete(str(index), result(4, index / 10, finished=True))
    space = {"masking.ratio": {"float": [0.1, 0.95]}, "loss.mim_weight": {"float": [0.0, 2.0]}}
    base = {**BASE, "masking": {"strategy": "disjoint"}}
    new = load_study(write(tmp_path, space, base=base), "new")
    trial_store, source = TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "old", new)
    strategies = [t.params["masking.strategy"] for t in TrialStore(old, tmp_path).trials()]
    assert transfer_trials(trial_store, source).num_copied == strategies.count("disjoint") > 0
    taken = [t for t in trial_store.all_trials() if t.state is TrialState.COMPLETE]
    assert all(set(t.params) == set(space) and t.params["loss.mim_weight"] == 1.0 for t in taken)
    assert {t.value for t in taken} == {n / 10 for n, s in enumerate(strategies) if s == "disjoint"}
    assert trial_store.trials() == [] and transfer_trials(trial_store, source).num_copied == 0
    with pytest.raises(ConfigError, match=r"there is no study 'olf'.*did you mean 'old'"):
        load_source_study(tmp_path / DATABASE, "olf", new)


def test_a_budget_counts_earlier_runs(tmp_path: Path) -> None:
    study = make_study(tmp_path, gpu_hours=0.5)
    trial_store = TrialStore(study, tmp_path)
    budget, trial = Budget(trial_store, gpus_per_worker=2.0), trial_store.ask()
    budget.begin(trial)
    assert budget.reached_limit() is None
    budget._running[trial.number] = trial, time.monotonic() - 1000
    assert budget.reached_limit() == "the budget of 0.5 GPU-hours is spent"
    budget.end(trial)
    assert Budget(TrialStore(study, tmp_path), gpus_per_worker=2.0).hours == pytest.approx(2000 / 3600, rel=1e-3)
    assert Budget(TrialStore(study, tmp_path)).reached_limit() is None
    wider = make_study(tmp_path, gpu_hours=0.5, workers_per_trial=2)
    assert Budget(TrialStore(wider, tmp_path), gpus_per_worker=4.0).hours == pytest.approx(2000 / 3600, rel=1e-3)


def test_the_time_a_trial_waits_for_resources_is_not_charged(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=1)
    searcher, _ = make_searcher(study, tmp_path)

    def charged() -> float:
        return float(TrialStore(study, tmp_path).trials()[0].user_attrs.get("worker_s", 0.0))

    searcher.suggest("a")
    time.sleep(0.2)
    held_at = time.monotonic()
    searcher.on_trial_result("a", {"resources_held": True})
    assert charged() == 0
    time.sleep(0.2)
    searcher.on_trial_result("a", {"resources_held": False})
    assert 0.2 <= (held := charged()) <= time.monotonic() - held_at
    time.sleep(0.2)
    searcher.on_trial_complete("a", result(4, 0.5, finished=True))
    assert charged() == held
