"""What a search proposes: after a killed driver, with constraints, on grids, in forks, and when the space is exhausted."""

import itertools
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from csmae.cluster.resources import Allocation
from csmae.config import Config, ConfigError
from csmae.model.cost import cost
from csmae.storage.layout import DATABASE
from csmae.study.study import Study, load_study
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from csmae.tuning.champion import encoders_to_score
from csmae.tuning.driver import run_search
from csmae.tuning.events import SearchOutcome
from csmae.tuning.searcher import StudySearcher
from tests.study.test_study import write
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")

RATIOS = {"masking.ratio": {"float": [0.3, 0.9], "step": 0.1}}

DECODERS = {"model.decoder_depth": {"int": [1, 8]}, "masking.strategy": {"choice": ["random", "disjoint"]}}


def train_all(searcher: StudySearcher, limit: int = 200) -> list[dict[str, Any]]:
    """Train all proposals one after the other, each with its masking ratio as the score."""
    done: list[dict[str, Any]] = []
    while isinstance(suggestion := searcher.suggest(str(len(done))), dict) and len(done) < limit:
        run_dir, config = Path(suggestion["run_dir"]), suggestion["config"]
        (run_dir / "encoder").mkdir(parents=True)
        params = float(cost(Config.model_validate(config)).params)
        outcome = result(4, config["masking"]["ratio"], finished=True) | {"metrics/cost/params": params}
        searcher.on_trial_complete(str(len(done)), outcome)
        done.append(suggestion)
    return done


def reasons(study: Study, folder: Path) -> list[str]:
    return [t.user_attrs["reason"] for t in TrialStore(study, folder).all_trials() if "not_trained" in t.user_attrs]


# After a killed driver


def test_a_duplicate_that_a_dead_driver_had_not_rejected_yet_is_rejected(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=5)
    trial_store = TrialStore(study, tmp_path)
    first = trial_store.ask()
    study.space.suggest(first)
    trial_store.complete(first, (0.5,))
    trial_store.enqueue(study.space.point({}))
    study.space.suggest(trial_store.ask())
    searcher, _ = make_searcher(study, tmp_path)
    suggestion = searcher.suggest("a")
    assert isinstance(suggestion, dict) and suggestion["number"] == 2
    assert reasons(study, tmp_path) == ["same configuration as trial 0"]


def test_an_invalid_point_that_a_dead_driver_left_is_rejected(tmp_path: Path) -> None:
    space = {"model.embed_dim": {"choice": [96, 128]}, "model.num_heads": {"choice": [3, 4]}}
    base = {"model": {"size": "nano", "embed_dim": 96, "num_heads": 4}}
    study = load_study(write(tmp_path, space, base=base, num_trials=12, sampler="random"))
    trial_store = TrialStore(study, tmp_path)
    trial_store.enqueue({"model.embed_dim": 128, "model.num_heads": 3})
    trial_store.ask()
    study.space.suggest(trial_store.ask())
    searcher, _ = make_searcher(study, tmp_path)
    configs = [s["config"]["model"] for s in map(searcher.suggest, "abc") if isinstance(s, dict)]
    assert sorted((m["embed_dim"], m["num_heads"]) for m in configs) == [(96, 3), (96, 4), (128, 4)]


def test_a_driver_killed_during_a_proposal_leaves_no_false_duplicate(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=5, start_from=[])
    TrialStore(study, tmp_path).ask()  # the driver dies before the trial has any value
    searcher, _ = make_searcher(study, tmp_path)
    left, new = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(left, dict) and isinstance(new, dict)
    assert (left["number"], new["number"]) == (0, 1)


def test_confirmations_that_a_dead_driver_enqueued_do_not_count_as_explored(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sampler": "random", "confirm": {"top": 1, "seeds": 2}}
    study = make_study(tmp_path, num_trials=2, **settings)
    train_all(make_searcher(study, tmp_path)[0], limit=2)
    trial_store = TrialStore(study, tmp_path)
    trial_store.enqueue(leaderboard(trial_store.optuna_study).ranked[0].params, confirms=0, seed=77)
    longer = make_study(tmp_path, num_trials=4, **settings)
    train_all(make_searcher(longer, tmp_path)[0])
    trial_store = TrialStore(longer, tmp_path)
    assert len(trial_store.explored()) == 4
    assert all(trial.user_attrs.get("seed") != 77 for trial in trial_store.trials())


def test_a_starting_point_added_later_is_trained(tmp_path: Path) -> None:
    train_all(make_searcher(make_study(tmp_path, num_trials=1), tmp_path)[0])
    more = make_study(tmp_path, num_trials=2, start_from=[{}, {"masking.ratio": 0.77}])
    assert [s["config"]["masking"]["ratio"] for s in train_all(make_searcher(more, tmp_path)[0])] == [0.77]


def test_a_failed_configuration_is_not_trained_again_after_a_restart(tmp_path: Path) -> None:
    study = make_study(tmp_path, RATIOS, num_trials=99, sampler="grid")
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"failed": "nan", "done": True})
    again = train_all(make_searcher(study, tmp_path)[0])
    assert len(again) == 6 and 0.5 not in [round(s["config"]["masking"]["ratio"], 9) for s in again]


# Grids, constraints and exhausted spaces


def test_a_grid_can_follow_another_sampler(tmp_path: Path) -> None:
    train_all(make_searcher(make_study(tmp_path, RATIOS, num_trials=2, sampler="random"), tmp_path)[0])
    grid = make_study(tmp_path, RATIOS, num_trials=99, sampler="grid")
    searcher, _ = make_searcher(grid, tmp_path)
    assert len(train_all(searcher)) == 5
    assert "no further point to train" in searcher.end_reason
    ratios = {round(trial.params["masking.ratio"], 9) for trial in TrialStore(grid, tmp_path).trials()}
    assert ratios == {0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}


def test_an_interrupted_grid_has_the_order_of_an_uninterrupted_one(tmp_path: Path) -> None:
    orders = []
    for name, limits in (("one", [99]), ("two", [2, 3, 99])):
        study = make_study(tmp_path / name, RATIOS, num_trials=99, sampler="grid", start_from=[])
        parts = [train_all(make_searcher(study, tmp_path / name)[0], limit) for limit in limits]
        orders.append([s["config"]["masking"]["ratio"] for s in itertools.chain(*parts)])
    assert sorted(set(orders[0])) == sorted(orders[0]) and orders[0] == orders[1]


def test_a_grid_with_confirmation_trains_num_trials_and_the_confirmations(tmp_path: Path) -> None:
    study = make_study(tmp_path, RATIOS, num_trials=3, sampler="grid", confirm={"top": 1, "seeds": 2})
    trained = train_all(make_searcher(study, tmp_path)[0])
    assert [s["config"]["train"]["seed"] for s in trained] == [0, 0, 0, 1, 2]


def test_a_space_that_constraints_make_small_is_trained_completely(tmp_path: Path) -> None:
    study = make_study(tmp_path, DECODERS, constraints={"cost/params": "<= 1.4e6"}, num_trials=16, startup_trials=2)
    possible = [point for point in study.space.grid() if cost(study.resolve(point)).params <= 1.4e6]
    searcher, _ = make_searcher(study, tmp_path)
    assert 0 < len(train_all(searcher)) == len(possible) < 16
    assert searcher.search_end is None and searcher.end_reason


@pytest.mark.parametrize("sampler", ["gp", "qmc", "nsga2"])
def test_samplers_that_do_not_learn_from_rejections_still_find_points(tmp_path: Path, sampler: str) -> None:
    space = {"model.decoder_depth": {"int": [1, 8]}, "masking.ratio": {"float": [0.3, 0.9]}}
    study = make_study(tmp_path, space, constraints={"cost/params": "<= 1.4e6"}, num_trials=6, sampler=sampler)
    searcher, _ = make_searcher(study, tmp_path)
    trained = train_all(searcher)
    assert len(trained) == 6 and searcher.search_end is None
    assert all(cost(Config.model_validate(s["config"])).params <= 1.4e6 for s in trained)


# Definitions of studies


def test_the_order_of_objectives_is_part_of_a_study(tmp_path: Path) -> None:
    one, two = ({"val/f1/s1_to_s2": "maximize"}, {"val/f1/s2_to_s1": "maximize"})
    trial_store = TrialStore(make_study(tmp_path, objectives=one | two), tmp_path)
    trial_store.record_epoch(trial_store.optuna_study.ask(), 1, (0.5, 0.5))  # before this, the study may be redefined
    with pytest.raises(ConfigError, match=r"search\.objectives was"):
        TrialStore(make_study(tmp_path, objectives=two | one), tmp_path)


@pytest.mark.parametrize("now", [{"float": [0, 4], "step": 1}, {"int": [0, 4]}, {"float": [0, 4.00001]}])
def test_every_part_of_a_domain_is_part_of_a_study(tmp_path: Path, now: dict[str, Any]) -> None:
    trial_store = TrialStore(make_study(tmp_path, {**SPACE, "loss.mim_weight": {"float": [0, 4]}}), tmp_path)
    trial_store.record_epoch(trial_store.optuna_study.ask(), 1, (0.5,))
    with pytest.raises(ConfigError, match=r"space\.loss\.mim_weight was float 0 to 4, is"):
        TrialStore(make_study(tmp_path, {**SPACE, "loss.mim_weight": now}), tmp_path)


def test_a_study_of_another_program_is_rejected(tmp_path: Path) -> None:
    other = optuna.create_study(storage=f"sqlite:///{tmp_path}/{DATABASE}", study_name="study")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    study = make_study(tmp_path)
    with pytest.raises(ConfigError, match="was not created by this program: use --name"):
        TrialStore(study, tmp_path)
    with pytest.raises(ConfigError, match="no trial can be transferred"):
        load_source_study(tmp_path / DATABASE, "study", study)


# Forks


def test_a_starting_point_is_trained_although_the_source_study_trained_it(tmp_path: Path) -> None:
    old = load_study(write(tmp_path, SPACE, num_trials=3, sampler="random"), "old")
    train_all(make_searcher(old, tmp_path)[0])
    new = load_study(write(tmp_path, SPACE, num_trials=2, sampler="random"), "new")
    assert (
        transfer_trials(TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "old", new)).num_copied == 3
    )
    trained = train_all(make_searcher(new, tmp_path)[0])
    assert [s["never_stop"] for s in trained] == [True, False]
    assert trained[0]["config"]["masking"]["ratio"] == 0.5


def test_constraints_are_transferred_also_to_a_fork_of_a_fork(tmp_path: Path) -> None:
    limit = {"time/epoch_s": "<= 10"}
    studies = [load_study(write(tmp_path, SPACE, num_trials=4, constraints=limit), name) for name in "abc"]
    searcher, _ = make_searcher(studies[0], tmp_path)
    for index in range(4):
        searcher.suggest(str(index))
        searcher.on_trial_complete(str(index), result(4, 0.1, finished=True) | {"metrics/time/epoch_s": 8.0 + index})
    for before, after in itertools.pairwise(studies):
        trial_store = TrialStore(after, tmp_path)
        assert transfer_trials(trial_store, load_source_study(tmp_path / DATABASE, before.name, after)).num_copied == 4
        taken = [trial for trial in trial_store.all_trials() if trial.state is TrialState.COMPLETE]
        assert [trial.constraints for trial in taken] == [{"time/epoch_s": over} for over in (-2.0, -1.0, 0.0, 1.0)]
    assert transfer_trials(trial_store, load_source_study(tmp_path / DATABASE, "a", studies[2])).num_copied == 0


def test_a_trial_that_the_new_constraints_cannot_judge_is_not_transferred(tmp_path: Path) -> None:
    old = load_study(write(tmp_path, DECODERS, num_trials=4, sampler="random"), "old")
    train_all(make_searcher(old, tmp_path)[0])
    for limit, count in (({"time/epoch_s": "<= 10"}, 0), ({"cost/params": "<= 1.4e6"}, 4)):
        new = load_study(write(tmp_path, DECODERS, constraints=limit), f"new-{count}")
        trial_store = TrialStore(new, tmp_path)
        assert transfer_trials(trial_store, load_source_study(tmp_path / DATABASE, "old", new)).num_copied == count
        taken = [trial for trial in trial_store.all_trials() if trial.state is TrialState.COMPLETE]
        found = [trial.constraints["cost/params"] for trial in taken]
        assert found == [cost(new.resolve(trial.params)).params - 1.4e6 for trial in taken]


def test_nothing_is_transferred_from_a_study_of_another_archive(tmp_path: Path) -> None:
    base = {"model": {"size": "nano"}, "optim": {"warmup_epochs": 0}, "train": {"epochs": 4}}
    small = base | {"data": {"synthetic": {"num_train": 256}}}
    old = load_study(write(tmp_path, SPACE, base=small, num_trials=2, sampler="random"), "old")
    train_all(make_searcher(old, tmp_path)[0])
    new = load_study(write(tmp_path, SPACE, base=base), "new")
    assert (
        transfer_trials(TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "old", new)).num_copied == 0
    )


# Budgets and champions


def test_an_exhausted_budget_starts_no_trial(tmp_path: Path) -> None:
    study = make_study(tmp_path, gpu_hours=0.001)
    trial_store = TrialStore(study, tmp_path)
    trial = trial_store.ask()
    study.space.suggest(trial)
    trial.set_user_attr("worker_s", 99.0)
    ending = run_search(Budget(TrialStore(study, tmp_path)), Allocation(1, 1, 1.0, 0.0), lambda event: None)
    assert (ending.outcome, ending.reason) == (
        SearchOutcome.BUDGET_EXHAUSTED,
        "the budget of 0.001 worker-hours is spent",
    )
    again = TrialStore(study, tmp_path)
    assert [trial.state for trial in again.all_trials()] == [TrialState.WAITING] and again.num_interrupted == 1


def test_a_trial_cut_short_before_its_first_epoch_restarts_when_the_study_resumes(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=2)
    searcher, _ = make_searcher(study, tmp_path)
    for name in "ab":
        searcher.suggest(name)
    searcher.on_trial_result("b", result(1, 0.4))
    searcher.cut_short_trials("the time limit of 1s is reached")
    trial_store = TrialStore(study, tmp_path)
    assert [(t.number, t.state.name, t.user_attrs["reason"]) for t in trial_store.trials()] == [
        (1, "PRUNED", "the time limit of 1s is reached")
    ]
    assert [trial.number for trial in leaderboard(trial_store.optuna_study).ranked] == [1]
    again, _ = make_searcher(make_study(tmp_path, num_trials=3), tmp_path)
    first, second = again.suggest("c"), again.suggest("d")
    assert isinstance(first, dict) and isinstance(second, dict)
    assert (first["never_stop"], first["config"]["masking"]["ratio"], second["never_stop"]) == (True, 0.5, False)
    assert again.suggest("e") is None


def test_the_default_configuration_is_scored_only_if_its_encoder_exists(tmp_path: Path) -> None:
    study = make_study(tmp_path, RATIOS, num_trials=99, sampler="grid", keep=1, start_from=[])
    train_all(make_searcher(study, tmp_path)[0])
    assert [encoder.name for encoder in encoders_to_score(TrialStore(study, tmp_path))] == [
        "untrained encoder",
        "champion",
    ]
