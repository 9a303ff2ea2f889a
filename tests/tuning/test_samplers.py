"""What samplers propose, and what they see of a study."""

from pathlib import Path

import optuna
import pytest
from optuna.samplers import NSGAIISampler
from optuna.trial import TrialState

from csmae.trials.attributes import EPOCH_VALUES
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.trial import curve
from csmae.tuning.sampler_view import visible_trials
from csmae.tuning.samplers import make_sampler, population_size
from tests.tuning.test_proposals import train_all
from tests.tuning.test_searcher import make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "nsga2"])
def test_every_sampler_proposes_and_learns(tmp_path: Path, sampler: str) -> None:
    study = make_study(tmp_path, sampler=sampler, num_trials=8, startup_trials=2)
    searcher, _ = make_searcher(study, tmp_path)
    for index in range(8):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        value = 1 - abs(suggestion["config"]["masking"]["ratio"] - 0.7)
        searcher.on_trial_complete(str(index), result(4, value, finished=True))
    best = leaderboard(TrialStore(study, tmp_path).optuna_study).ranked[0]
    assert best.state is TrialState.COMPLETE and best.value is not None and best.value > 0.8


def test_nsga2_has_generations_within_a_study_and_learns_from_starting_points(tmp_path: Path) -> None:
    space = {
        name: {"float": [0.3, 0.9]} for name in ("masking.ratio", "loss.mim_weight", "loss.cmr_weight", "optim.lr")
    }
    study = make_study(tmp_path, space, sampler="nsga2", strategy="none", num_trials=32)
    assert population_size(study.search) == 6
    train_all(make_searcher(study, tmp_path)[0])
    trial_store, key = TrialStore(study, tmp_path), NSGAIISampler._get_generation_key()
    generations = [trial.system_attrs.get(key) for trial in trial_store.trials()]
    assert generations[:7] == [None, 0, 0, 0, 0, 0, 1] and max(g for g in generations if g is not None) >= 4
    late = [trial.params["masking.ratio"] for trial in trial_store.trials()[-12:]]
    assert sum(late) / len(late) > 0.67  # the score is the ratio; at random, between 0.3 and 0.9, it is 0.6


def test_with_several_objectives_tpe_gets_the_best_pruned_trials_first(tmp_path: Path) -> None:
    goals = {"val/f1_mean": "maximize", "cost/flops": "minimize"}
    study = make_study(tmp_path, objectives=goals)
    trial_store = TrialStore(study, tmp_path)
    for epoch, score, flops in ((1, 0.1, 9.0), (1, 0.3, 5.0), (3, 0.2, 9.0), (1, 0.2, 9.0), (3, 0.2, 2.0)):
        attributes = {f"{EPOCH_VALUES}{epoch}": (score, flops)}
        trial_store.optuna_study.add_trial(optuna.create_trial(state=TrialState.PRUNED, user_attrs=attributes))
    seen = visible_trials(study.search, make_sampler(study.search, 0), trial_store.all_trials())
    assert [t.number for t in seen if t.state is TrialState.PRUNED] == [5, 3, 2, 4, 1]


def test_qmc_draws_new_conditional_parameters_each_time(tmp_path: Path) -> None:
    space = {
        "loss.mim_weight": {"choice": [0.0, 1.0]},
        "loss.temperature": {"float": [0.05, 1.0], "when": {"loss.mim_weight": "> 0"}},
        "masking.ratio": {"float": [0.3, 0.9]},
    }
    study = make_study(tmp_path, space, sampler="qmc", num_trials=12, start_from=[{"loss.mim_weight": 0.0}])
    train_all(make_searcher(study, tmp_path)[0])
    drawn = [
        t.params["loss.temperature"] for t in TrialStore(study, tmp_path).trials() if "loss.temperature" in t.params
    ]
    assert len(set(drawn)) == len(drawn) > 2


def test_tpe_learns_from_pruned_trials_with_several_objectives(tmp_path: Path) -> None:
    goals = {"val/f1_mean": "maximize", "cost/flops": "minimize"}
    study = make_study(tmp_path, objectives=goals, num_trials=12, startup_trials=3)
    searcher, _ = make_searcher(study, tmp_path)
    for index in range(12):
        name, flops = str(index), {"metrics/cost/flops": 10.0 - index}
        assert isinstance(searcher.suggest(name), dict)
        searcher.on_trial_result(name, result(1, index % 7 / 10) | flops)
        ended = {"finished": True} if index % 3 == 0 else {}
        searcher.on_trial_complete(name, result(2, index % 7 / 10, **ended) | flops)
    trials = TrialStore(study, tmp_path).trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert curve(trials[1]) == {1: (0.1, 9.0), 2: (0.1, 9.0)}
