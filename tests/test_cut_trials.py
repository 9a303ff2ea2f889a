"""Trials that a budget cuts short, while they run or before a search that goes on has begun."""

import json
from pathlib import Path
from typing import Any

from csmae.tuning.budget import Budget
from csmae.tuning.cluster import Share
from csmae.tuning.events import Ended, Ending, Event, Started, Waiting
from csmae.tuning.ledger import Ledger
from csmae.tuning.run import run_search
from test_searcher import make_searcher, make_study, result

OVER = "the time limit of 1s is reached"


def without_score(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "metrics/train/loss": 1.0}


def started(folder: Path, **search: Any) -> dict[str, Any]:
    """A trial that has a checkpoint and no score yet, cut by its budget."""
    searcher, _ = make_searcher(make_study(folder, **search), folder)
    suggestion = searcher.suggest("a")
    assert isinstance(suggestion, dict)
    run_dir = Path(suggestion["run_dir"])
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoint.pt").touch()
    searcher.on_trial_result("a", without_score(1))
    searcher.abandon(OVER)
    return suggestion


def test_a_trial_that_is_cut_before_its_first_score_goes_on_under_its_number(tmp_path: Path) -> None:
    first = started(tmp_path)
    study = make_study(tmp_path)
    assert [trial.state.name for trial in Ledger(study, tmp_path).all_trials()] == ["WAITING"]
    again, told = make_searcher(study, tmp_path)
    assert again.suggest("b") == first
    assert isinstance(told[0], Started) and told[0].resumed
    again.on_trial_complete("b", result(4, 0.5, finished=True))
    second = again.suggest("c")
    assert isinstance(second, dict) and second["number"] == 1
    assert [trial.state.name for trial in Ledger(study, tmp_path).all_trials()] == ["COMPLETE", "RUNNING"]
    assert [path.parent.name for path in tmp_path.glob("study/trials/*/checkpoint.pt")] == ["0"]


def test_a_trial_may_be_cut_again_and_again(tmp_path: Path) -> None:
    first, study = started(tmp_path), make_study(tmp_path)
    for _ in range(2):
        searcher, told = make_searcher(study, tmp_path)
        assert searcher.suggest("a") == first
        searcher.abandon(OVER)
        assert told[-1] == Waiting(0, OVER)
    assert len(Ledger(study, tmp_path).all_trials()) == 1


def test_a_repetition_that_is_cut_before_its_first_score_keeps_its_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=1, confirm={"top": 1, "seeds": 1})
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.5, finished=True))
    repetition = searcher.suggest("b")
    searcher.abandon(OVER)
    again, _ = make_searcher(study, tmp_path)
    assert isinstance(repetition, dict) and repetition["config"]["train"]["seed"] == 1
    assert again.suggest("c") == repetition
    again.on_trial_complete("c", result(4, 0.4, finished=True))
    assert again.suggest("d") == "FINISHED" and len(Ledger(study, tmp_path).all_trials()) == 2


def begin_and_die(folder: Path, **search: Any) -> None:
    """A driver that dies with two trials at work, of which the first has a score."""
    searcher, _ = make_searcher(make_study(folder, **search), folder)
    for name in "ab":
        searcher.suggest(name)
    searcher.on_trial_result("a", result(1, 0.4))
    searcher.on_trial_result("b", without_score(1))


def search_without_time(folder: Path, **search: Any) -> tuple[Ledger, list[Event]]:
    ledger, told = Ledger(make_study(folder, time_limit="1s", **search), folder), list[Event]()
    ledger.optuna.set_user_attr("runs_s", 5.0)
    assert run_search(Budget(ledger), Share(1, 1.0, 0.0), told.append) == Ending("budget", OVER)
    return ledger, told


def test_a_budget_that_is_over_at_the_start_leaves_no_trial_running(tmp_path: Path) -> None:
    begin_and_die(tmp_path)
    ledger, told = search_without_time(tmp_path)
    assert [trial.state.name for trial in ledger.all_trials()] == ["PRUNED", "WAITING"]
    ended, waiting = told
    assert isinstance(ended, Ended) and (ended.number, ended.state, ended.reason) == (0, "PRUNED", OVER)
    assert waiting == Waiting(1, OVER)
    assert [trial.number for trial in ledger.ranked()] == [0]
    again, _ = make_searcher(make_study(tmp_path), tmp_path)
    suggestion = again.suggest("c")
    assert isinstance(suggestion, dict) and suggestion["number"] == 1


def test_a_trial_of_a_dead_driver_wins_only_within_its_constraints(tmp_path: Path) -> None:
    search = {"constraints": {"time/epoch_s": "<= 10"}}
    for seconds, winners in ((None, []), (50.0, []), (5.0, [0])):
        folder = tmp_path / str(seconds)
        begin_and_die(folder, **search)
        if seconds:
            saved = folder / "study/trials/0/encoder/config.json"
            saved.parent.mkdir(parents=True)
            saved.write_text(json.dumps({"details": {"epoch": 1, "metrics": {"time/epoch_s": seconds}}}))
        ledger, _ = search_without_time(folder, **search)
        assert [trial.number for trial in ledger.ranked()] == winners
