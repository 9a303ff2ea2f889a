"""Objectives and constraints: their names are checked before the search and at the first epoch; some metrics are optional."""

from pathlib import Path
from typing import Any

import pytest

from csmae.storage.layout import DATABASE
from csmae.study.metrics import METRICS, TERMS
from csmae.study.study import Study, load_study
from csmae.training.trainer import pretrain
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from csmae.tuning.events import SearchEnd, SearchOutcome
from tests.conftest import small_config
from tests.study.test_study import BASE, assert_rejected, write
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result


def test_the_names_of_metrics_are_those_that_a_training_reports() -> None:
    every = next(pretrain(small_config(loss__mde_weight=1.0))).metrics
    known = {name for name in every if not name.startswith("system/")}
    assert known == set(METRICS) - {"time/gpu_s"}
    few = next(
        pretrain(small_config(loss__umr_weight=0.0, loss__mim_weight=0.0, loss__s1_weight=0.0, loss__mde_weight=1.0))
    )
    assert set(every) - set(few.metrics) == {"train/umr_s1", "train/umr_s2", "train/cmr_s2_to_s1", "train/mim"}
    assert set(every) - set(few.metrics) < set(TERMS)


@pytest.mark.parametrize(
    ("search", "texts"),
    [
        ({"constraints": {"train/los": "<= 1"}}, ["search.constraints", "'train/los'", "did you mean 'train/loss'?"]),
        ({"constraints": {"time/epoch": "<= 1"}}, ["search.constraints", "did you mean 'time/epoch_s'?"]),
        ({"constraints": {"val/f1_meen": ">= 1"}}, ["search.constraints", "did you mean 'val/f1_mean'?"]),
        ({"objectives": {"val/f1_meen": "maximize"}}, ["search.objectives", "did you mean 'val/f1_mean'?"]),
        ({"constraints": {"train/mde": "<= 1"}}, ["no configuration computes 'train/mde'", "loss.mde_weight is 0"]),
    ],
)
def test_a_metric_that_no_configuration_reports_is_rejected(
    tmp_path: Path, search: dict[str, Any], texts: list[str]
) -> None:
    assert_rejected(write(tmp_path, SPACE, **search), *texts)


def scored_every_second_epoch(folder: Path, **search: Any) -> Study:
    return load_study(write(folder, SPACE, base={**BASE, "eval": {"every": 2}}, **search))


def test_a_metric_that_this_machine_does_not_report_ends_the_search_at_the_first_epoch(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, constraints={"time/gpu_s": "<= 9"}), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 0.5) | {"metrics/time/worker_s": 2.0})
    assert searcher.search_end == SearchEnd(SearchOutcome.ABORTED, "no epoch reports 'time/gpu_s'")


def test_scores_are_expected_only_in_epochs_that_are_scored(tmp_path: Path) -> None:
    study = scored_every_second_epoch(
        tmp_path, objectives={"val/recall_at_1": "maximize"}, constraints={"val/mrr": ">= 0.1"}
    )
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, None))
    assert searcher.search_end is None
    searcher.on_trial_result("a", result(2, 0.5) | {"metrics/val/recall_at_1": 0.5})
    assert searcher.search_end == SearchEnd(SearchOutcome.ABORTED, "no epoch reports 'val/mrr'")


MIM = {"loss.mim_weight": {"choice": [0.0, 1.0]}, "masking.ratio": {"float": [0.3, 0.9]}}


def test_a_configuration_without_a_loss_term_cannot_violate_a_constraint_on_it(tmp_path: Path) -> None:
    search: dict[str, Any] = {"constraints": {"train/mim": "<= 3"}, "num_trials": 3}
    start = [{"loss.mim_weight": 0.0}, {"loss.mim_weight": 1.0}, {"loss.mim_weight": 1.0, "masking.ratio": 0.6}]
    study = load_study(write(tmp_path, MIM, start_from=start, **search), "old")
    searcher, _ = make_searcher(study, tmp_path)
    for index, (score, mim) in enumerate(
        ((0.4, {}), (0.5, {"metrics/train/mim": 2.0}), (0.9, {"metrics/train/mim": 4.0}))
    ):
        searcher.suggest(str(index))
        searcher.on_trial_complete(str(index), result(4, score, finished=True) | mim)
    assert searcher.search_end is None
    trial_store = TrialStore(study, tmp_path)
    assert [trial.state.name for trial in trial_store.trials()] == ["COMPLETE"] * 3
    assert [trial.number for trial in leaderboard(trial_store.optuna_study).ranked] == [1, 0]
    new = load_study(write(tmp_path, MIM, **search), "new")
    assert (
        transfer_trials(TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "old", new)).num_copied == 3
    )


def test_a_trial_that_is_cut_short_between_two_scores_counts_with_the_last_one(tmp_path: Path) -> None:
    searcher, events = make_searcher(
        scored_every_second_epoch(tmp_path, constraints={"val/mrr": ">= 0.5"}, num_trials=1), tmp_path
    )
    searcher.suggest("a")
    searcher.on_trial_result("a", result(2, 0.7) | {"metrics/val/mrr": 0.1})
    searcher.on_trial_result("a", result(3, None))
    searcher.cut_short_trials("the time limit of 1s is reached")
    assert leaderboard(searcher._trial_store.optuna_study).ranked == []
    assert events[-1].value == 0.7  # type: ignore[union-attr]


def test_a_metric_that_one_trial_lacks_fails_only_this_trial(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    for name, score in (("a", 0.5), ("b", None)):
        searcher.suggest(name)
        searcher.on_trial_complete(name, result(4, score, finished=True))
    assert searcher.search_end is None
    assert [t.state.name for t in searcher._trial_store.trials()] == ["COMPLETE", "FAIL"]
