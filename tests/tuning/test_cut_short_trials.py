"""Trials that a budget cuts short, while they run or before a resumed search has started them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from csmae.cluster.resources import Allocation
from csmae.storage.layout import DATABASE
from csmae.study.study import load_study
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from csmae.tuning.driver import run_search
from csmae.tuning.events import SearchEnd, SearchEvent, SearchOutcome, TrialEnded, TrialStarted, TrialWaiting
from tests.study.test_study import write
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result

OVER = "the time limit of 1s is reached"


def without_score(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "metrics/train/loss": 1.0}


def cut_before_first_score(folder: Path, **search: Any) -> dict[str, Any]:
    """Cut a trial short that has a checkpoint and no score yet; return its suggestion."""
    searcher, _ = make_searcher(make_study(folder, **search), folder)
    suggestion = searcher.suggest("a")
    assert isinstance(suggestion, dict)
    run_dir = Path(suggestion["run_dir"])
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoint.pt").touch()
    searcher.on_trial_result("a", without_score(1))
    searcher.cut_short_trials(OVER)
    return suggestion


def test_a_trial_cut_short_before_its_first_score_resumes_under_its_number(tmp_path: Path) -> None:
    first = cut_before_first_score(tmp_path)
    study = make_study(tmp_path)
    assert [trial.state.name for trial in TrialStore(study, tmp_path).all_trials()] == ["WAITING"]
    again, events = make_searcher(study, tmp_path)
    assert again.suggest("b") == first
    assert isinstance(events[0], TrialStarted) and events[0].resumed
    again.on_trial_complete("b", result(4, 0.5, finished=True))
    second = again.suggest("c")
    assert isinstance(second, dict) and second["number"] == 1
    assert [trial.state.name for trial in TrialStore(study, tmp_path).all_trials()] == ["COMPLETE", "RUNNING"]
    assert [path.parent.name for path in tmp_path.glob("study/trials/*/checkpoint.pt")] == ["0"]


def test_a_trial_can_be_cut_short_repeatedly(tmp_path: Path) -> None:
    first, study = cut_before_first_score(tmp_path), make_study(tmp_path)
    for _ in range(2):
        searcher, events = make_searcher(study, tmp_path)
        assert searcher.suggest("a") == first
        searcher.cut_short_trials(OVER)
        assert events[-1] == TrialWaiting(0, OVER)
    assert len(TrialStore(study, tmp_path).all_trials()) == 1


def test_a_confirmation_cut_short_before_its_first_score_keeps_its_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=1, confirm={"top": 1, "seeds": 1})
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.5, finished=True))
    confirmation = searcher.suggest("b")
    searcher.cut_short_trials(OVER)
    again, _ = make_searcher(study, tmp_path)
    assert isinstance(confirmation, dict) and confirmation["config"]["train"]["seed"] == 1
    assert again.suggest("c") == confirmation
    again.on_trial_complete("c", result(4, 0.4, finished=True))
    assert again.suggest("d") == "FINISHED" and len(TrialStore(study, tmp_path).all_trials()) == 2


def start_and_die(folder: Path, **search: Any) -> None:
    """Let a driver die while two trials run, of which the first has a score."""
    searcher, _ = make_searcher(make_study(folder, **search), folder)
    for name in "ab":
        searcher.suggest(name)
    searcher.on_trial_result("a", result(1, 0.4))
    searcher.on_trial_result("b", without_score(1))


def search_without_time(folder: Path, **search: Any) -> tuple[TrialStore, list[SearchEvent]]:
    trial_store, events = TrialStore(make_study(folder, time_limit="1s", **search), folder), list[SearchEvent]()
    trial_store.optuna_study.set_user_attr("elapsed_s", 5.0)
    assert run_search(Budget(trial_store), Allocation(1, 1, 1.0, 0.0), events.append) == SearchEnd(
        SearchOutcome.BUDGET_EXHAUSTED, OVER
    )
    return trial_store, events


def test_a_budget_that_is_exhausted_at_the_start_leaves_no_trial_running(tmp_path: Path) -> None:
    start_and_die(tmp_path)
    trial_store, events = search_without_time(tmp_path)
    assert [trial.state.name for trial in trial_store.all_trials()] == ["PRUNED", "WAITING"]
    ended, waiting = events
    assert isinstance(ended, TrialEnded) and (ended.number, ended.status, ended.reason) == (0, "PRUNED", OVER)
    assert waiting == TrialWaiting(1, OVER)
    assert [trial.number for trial in leaderboard(trial_store.optuna_study).ranked] == [0]
    again, _ = make_searcher(make_study(tmp_path), tmp_path)
    suggestion = again.suggest("c")
    assert isinstance(suggestion, dict) and suggestion["number"] == 1


def test_a_trial_of_a_dead_driver_can_win_only_within_its_constraints(tmp_path: Path) -> None:
    search = {"constraints": {"time/epoch_s": "<= 10"}}
    for seconds, winners in ((None, []), (50.0, []), (5.0, [0])):
        folder = tmp_path / str(seconds)
        start_and_die(folder, **search)
        if seconds:
            saved = folder / "study/trials/0/encoder/config.json"
            saved.parent.mkdir(parents=True)
            saved.write_text(json.dumps({"details": {"epoch": 1, "metrics": {"time/epoch_s": seconds}}}))
        trial_store, _ = search_without_time(folder, **search)
        assert [trial.number for trial in leaderboard(trial_store.optuna_study).ranked] == winners


SCORED_BY_RECALL = {"constraints": {"val/recall_at_1": ">= 0.5"}}


def trained_to_epoch_3(folder: Path, recall: float) -> TrialStore:
    """Let a driver die after an epoch without scores; the last scores are those of epoch 2."""
    searcher, _ = make_searcher(make_study(folder, **SCORED_BY_RECALL), folder)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(2, 0.4) | {"metrics/val/recall_at_1": recall})
    searcher.on_trial_result("a", without_score(3))
    return TrialStore(make_study(folder, **SCORED_BY_RECALL), folder)


@pytest.mark.parametrize("repeats_epoch", [False, True])
@pytest.mark.parametrize(("recall", "winners"), [(0.1, []), (0.6, [0])])
def test_a_trial_cut_short_after_a_restart_is_judged_by_its_last_scores(
    tmp_path: Path, recall: float, winners: list[int], repeats_epoch: bool
) -> None:
    trained_to_epoch_3(tmp_path, recall)
    if repeats_epoch:
        searcher, _ = make_searcher(make_study(tmp_path, **SCORED_BY_RECALL), tmp_path)
        searcher.suggest("a")
        searcher.on_trial_result("a", without_score(3))
        searcher.cut_short_trials(OVER)
    else:
        search_without_time(tmp_path, **SCORED_BY_RECALL)
    trial_store = TrialStore(make_study(tmp_path, **SCORED_BY_RECALL), tmp_path)
    assert [trial.state.name for trial in trial_store.all_trials()] == ["PRUNED"]
    assert [trial.number for trial in leaderboard(trial_store.optuna_study).ranked] == winners


def test_a_trial_cut_short_violates_a_constraint_whose_metric_is_unknown(tmp_path: Path) -> None:
    trial_store = TrialStore(make_study(tmp_path, **SCORED_BY_RECALL), tmp_path)
    trial = trial_store.ask()
    trial_store.study.space.suggest(trial)
    trial_store.record_epoch(trial, 2, (0.4,))  # without the metric under the constraint
    searcher, _ = make_searcher(make_study(tmp_path, **SCORED_BY_RECALL), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", without_score(3))
    searcher.cut_short_trials(OVER)
    (cut,) = TrialStore(make_study(tmp_path, **SCORED_BY_RECALL), tmp_path).all_trials()
    assert cut.constraints == {"val/recall_at_1": math.inf}


def test_a_waiting_trial_is_not_rejected_as_a_duplicate_of_a_transferred_one(tmp_path: Path) -> None:
    other = load_study(write(tmp_path, SPACE, num_trials=1), "other")
    searcher, _ = make_searcher(other, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.5, finished=True))
    plain: dict[str, Any] = {"start_from": [], "sampler": "random"}
    study = make_study(tmp_path, **plain)
    trial_store = TrialStore(study, tmp_path)
    trial = trial_store.ask()
    for name, value in study.space.encode(study.space.point({})).items():  # as if the sampler had drawn it
        trial_store.optuna_study._storage.set_trial_param(
            trial._trial_id,
            name,
            study.space.domains[name].distribution.to_internal_repr(value),
            study.space.domains[name].distribution,
        )
    searcher, _ = make_searcher(study, tmp_path)
    first = searcher.suggest("a")
    searcher.cut_short_trials(OVER)
    assert (
        transfer_trials(TrialStore(study, tmp_path), load_source_study(tmp_path / DATABASE, "other", study)).num_copied
        == 1
    )
    again, _ = make_searcher(study, tmp_path)
    assert again.suggest("b") == first


def test_a_confirmation_cut_short_after_its_first_score_resumes_under_its_number_and_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=1, confirm={"top": 1, "seeds": 1})
    searcher, events = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.5, finished=True))
    confirmation = searcher.suggest("b")
    assert isinstance(confirmation, dict)
    (Path(confirmation["run_dir"])).mkdir(parents=True)
    (Path(confirmation["run_dir"]) / "checkpoint.pt").touch()
    searcher.on_trial_result("b", result(2, 0.3))
    searcher.cut_short_trials(OVER)
    assert events[-1] == TrialWaiting(1, OVER)
    assert leaderboard(TrialStore(study, tmp_path).optuna_study).confirms == {1: 0}
    again, _ = make_searcher(study, tmp_path)
    assert again.suggest("c") == confirmation
    again.on_trial_complete("c", result(4, 0.4, finished=True))
    assert again.suggest("d") == "FINISHED"
    trial_store = TrialStore(study, tmp_path)
    assert leaderboard(trial_store.optuna_study).entries[0].scores == (0.5, 0.4) and len(trial_store.all_trials()) == 2
    assert list(tmp_path.glob("study/trials/*/checkpoint.pt")) == []
