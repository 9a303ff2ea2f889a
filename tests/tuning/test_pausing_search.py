"""Searches whose strategy pauses trials, without Ray: what is trained in which order, recorded, and decided after a restart."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from csmae.study.study import Study, load_study
from csmae.study.values import Value
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.trials.trial import assignments, params_of, paused_epoch, status_of
from csmae.tuning.events import SearchEvent, TrialEnded, TrialPaused, TrialStarted
from csmae.tuning.searcher import StudySearcher
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, Stop, Strategy
from csmae.tuning.strategy.make import make_strategy
from tests.study.test_study import BASE, write
from tests.support.promotion import Promotion
from tests.tuning.test_searcher import SPACE, result

pytestmark = pytest.mark.usefixtures("copied_database")

EPOCHS = 9

Killed = Callable[[str], bool]
"""Whether the driver dies at a point of the search."""


def make_study(folder: Path, space: dict[str, Any] = SPACE, **search: Any) -> Study:
    folder.mkdir(exist_ok=True)
    base = {**BASE, "train": {"epochs": EPOCHS}}
    return load_study(write(folder, space, base, **{"num_trials": 9, "sampler": "random", "start_from": [], **search}))


def score(config: dict[str, Any], epoch: int) -> float:
    """A curve that depends on the configuration."""
    noise = int(hashlib.md5(repr((config["masking"], epoch)).encode()).hexdigest(), 16) % 1000 / 1e4
    return float(config["masking"]["ratio"] * (1 - 0.5**epoch) + noise)


class Driver:
    """Runs a search with one trial at a time, as Tune and the workers would, and can die."""

    def __init__(self, study: Study, folder: Path, strategy: Strategy | None = None) -> None:
        self.events: list[SearchEvent] = []
        self.store = TrialStore(study, folder)
        budget, strategy = Budget(self.store), strategy or Promotion(EPOCHS)
        self.searcher = StudySearcher(budget, self.events.append, lambda: 1, strategy)
        self.pieces: list[tuple[int, int]] = []
        """Number and last epoch of each assignment."""

    def run(self, is_killed: Killed = lambda point: False, limit: int = 999) -> bool:
        """Train until the study is complete; returns whether it is."""
        for index in range(limit):
            name = f"assignment {len(self.pieces)}"
            if is_killed(f"before {name}"):
                return False
            suggestion = self.searcher.suggest(str(index))
            if suggestion == Searcher.FINISHED:
                return True
            assert isinstance(suggestion, dict)
            self.pieces.append((suggestion["number"], suggestion["until"]))
            if is_killed(f"start of {name}") or not self._train(str(index), suggestion, is_killed):
                return False
        return False

    def _train(self, trial_id: str, suggestion: dict[str, Any], is_killed: Killed) -> bool:
        config, checkpoint = suggestion["config"], Path(suggestion["run_dir"]) / "checkpoint.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        first = int(checkpoint.read_text()) if checkpoint.exists() else 1  # workers report a saved epoch again
        for epoch in range(max(first, 1), suggestion["until"] + 1):
            checkpoint.write_text(str(epoch))
            if is_killed(f"epoch {epoch} of {suggestion['number']}"):
                return False
            outcome = result(epoch, score(config, epoch))
            if epoch == suggestion["until"]:
                end = "finished" if epoch == config["train"]["epochs"] else "paused"
                assert self.searcher.should_continue(trial_id, outcome)
                self.searcher.on_trial_complete(trial_id, {**outcome, end: "", "done": True})
            else:
                assert self.searcher.should_continue(trial_id, outcome)
                self.searcher.on_trial_result(trial_id, outcome)
        return True


def test_trials_pause_at_rungs_and_the_best_are_promoted_until_one_is_complete(tmp_path: Path) -> None:
    driver = Driver(make_study(tmp_path), tmp_path)
    assert driver.run()
    assert driver.pieces[:4] == [(0, 1), (1, 1), (2, 1), (driver.pieces[3][0], 3)]
    trials = driver.store.all_trials()
    rungs = [max(trial.intermediate_values) for trial in trials]
    assert sorted(rungs)[-1] == EPOCHS and rungs.count(1) >= 5
    assert {status_of(trial) for trial in trials} == {TrialStatus.PAUSED, TrialStatus.COMPLETE}
    best = max(trials, key=lambda trial: max(trial.intermediate_values.values()))
    assert best.state is TrialState.COMPLETE
    assert all(
        sorted(trial.intermediate_values) == list(range(1, rung + 1)) for trial, rung in zip(trials, rungs, strict=True)
    )


def test_the_events_say_why_a_trial_starts_pauses_and_resumes(tmp_path: Path) -> None:
    driver = Driver(make_study(tmp_path), tmp_path)
    driver.run()
    (promoted,) = {piece[0] for piece in driver.pieces if piece[1] == EPOCHS}
    events = [event for event in driver.events if event.number == promoted and not hasattr(event, "metrics")]
    starts = [event for event in events if isinstance(event, TrialStarted)]
    assert (starts[0].resumed, starts[0].until, starts[0].reason) == (False, 1, "first rung of 1 epoch")
    assert starts[1].resumed and starts[1].until == 3 and starts[1].reason.startswith("among the best third of ")
    assert TrialPaused(promoted, 1, "first rung of 1 epoch") in events
    assert isinstance(events[-1], TrialEnded) and events[-1].status is TrialStatus.COMPLETE
    stored = assignments(driver.store.all_trials()[promoted])
    assert [(piece["from"], piece["until"], piece["reason"]) for piece in stored] == [
        (before, event.until, event.reason) for before, event in zip((0, 1, 3), starts, strict=True)
    ]


def decided(driver: Driver) -> list[Any]:
    """All that a search leaves in the trial store."""
    names = ("assignments", "stopped")
    return [
        (trial.number, trial.params, trial.state, trial.intermediate_values, [trial.user_attrs.get(n) for n in names])
        for trial in driver.store.all_trials()
    ]


STRATEGIES: dict[str, Callable[[Study], Strategy]] = {
    "promotion": lambda study: Promotion(EPOCHS, stop_last=True),
    "auto": make_strategy,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_that_is_killed_anywhere_decides_as_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    def driver(folder: Path) -> Driver:
        study = make_study(folder, strategy="auto")
        return Driver(study, folder, STRATEGIES[name](study))

    def killed_once(points: set[str]) -> Killed:
        def is_killed(point: str) -> bool:
            fresh = point not in points
            points.add(point)
            return fresh and sum(map(ord, point)) % 3 == 0

        return is_killed

    undisturbed = driver(tmp_path / "a")
    assert undisturbed.run()
    points, drivers = set[str](), list[Driver]()
    while True:
        drivers.append(driver(tmp_path / "b"))
        if drivers[-1].run(killed_once(points)):
            break
    assert len(drivers) > 10
    assert decided(drivers[-1]) == decided(undisturbed)


def test_a_strategys_stop_ends_a_paused_trial_as_pruned(tmp_path: Path) -> None:
    driver = Driver(make_study(tmp_path), tmp_path, Promotion(EPOCHS, stop_last=True))
    driver.run()
    trials = driver.store.all_trials()
    assert {trial.state for trial in trials} == {TrialState.PRUNED, TrialState.COMPLETE}
    stopped = [event for event in driver.events if isinstance(event, TrialEnded) and event.status == "PRUNED"]
    assert stopped and all(event.reason == "not among the best" for event in stopped)
    assert [event.value for event in stopped] == [
        trials[event.number].intermediate_values[max(trials[event.number].intermediate_values)] for event in stopped
    ]


def test_paused_trials_stay_paused_when_a_search_is_cut_short_and_the_next_one_continues(tmp_path: Path) -> None:
    driver = Driver(make_study(tmp_path), tmp_path)
    driver.run(limit=2)
    suggestion = driver.searcher.suggest("last")
    assert isinstance(suggestion, dict)
    driver.searcher.on_trial_result("last", {"epoch": 1, "metrics/train/loss": 1.0})
    driver.searcher.cut_short_trials("the time limit of 1s is reached")
    statuses = [status_of(trial) for trial in TrialStore(make_study(tmp_path), tmp_path).all_trials()]
    assert statuses == [TrialStatus.PAUSED, TrialStatus.PAUSED, TrialStatus.WAITING]
    later = Driver(make_study(tmp_path), tmp_path)
    assert later.run()
    assert later.pieces[0] == (2, 1) and later.pieces[1][1] == 3


def test_a_strategy_that_pauses_loses_no_running_trial_when_a_budget_ends(tmp_path: Path) -> None:
    study = make_study(tmp_path, strategy="auto")
    driver = Driver(study, tmp_path, Scripted(NewTrial(EPOCHS, "to the end")))
    driver.run(lambda point: point == "epoch 5 of 0")
    driver.searcher.cut_short_trials("the time limit of 1s is reached")
    assert driver.events[-1] == TrialPaused(0, 4, "the time limit of 1s is reached")
    later = Driver(study, tmp_path, Scripted(Resume(0, EPOCHS, "the best")))
    assert [status_of(trial) for trial in later.store.all_trials()] == [TrialStatus.PAUSED]
    assert later.run() and later.pieces == [(0, EPOCHS)]
    (trial,) = later.store.all_trials()
    assert trial.state is TrialState.COMPLETE and sorted(trial.intermediate_values) == list(range(1, EPOCHS + 1))
    assert [piece.get("paused") for piece in assignments(trial)] == [4, None]


def test_a_trial_that_an_earlier_driver_left_running_is_paused_by_a_budget_that_is_used_up(tmp_path: Path) -> None:
    study = make_study(tmp_path, strategy="auto")
    Driver(study, tmp_path, Scripted(NewTrial(EPOCHS, "to the end"))).run(lambda point: point == "epoch 5 of 0")
    driver = Driver(study, tmp_path, Scripted())
    driver.searcher.cut_short_trials("the time limit of 1s is reached")
    assert driver.events == [TrialPaused(0, 4, "the time limit of 1s is reached")]
    (trial,) = driver.store.all_trials()
    assert status_of(trial) is TrialStatus.PAUSED and paused_epoch(trial) == 4


def test_a_trial_that_was_cut_short_after_its_last_epoch_needs_only_its_end(tmp_path: Path) -> None:
    study = make_study(tmp_path, strategy="auto")
    driver = Driver(study, tmp_path, Scripted(NewTrial(EPOCHS, "to the end")))
    driver.run(lambda point: point == f"epoch {EPOCHS} of 0")
    config = study.resolve(params_of(driver.store.all_trials()[0])).model_dump(mode="json")
    driver.searcher.on_trial_result("0", result(EPOCHS, score(config, EPOCHS)))
    driver.searcher.cut_short_trials("the time limit of 1s is reached")
    later = Driver(study, tmp_path, Scripted(Resume(0, EPOCHS, "the best")))
    assert later.run() and later.store.all_trials()[0].state is TrialState.COMPLETE


def test_a_trial_without_a_score_at_a_rung_is_resumed_for_at_least_one_epoch(tmp_path: Path) -> None:
    driver = Driver(make_study(tmp_path), tmp_path, Scripted(NewTrial(3, "first rung"), Resume(0, 3, "the best")))
    assert driver.run() and driver.pieces == [(0, 3), (0, 4)]


def test_what_an_assignment_used_is_added_to_the_trials_earlier_ones(tmp_path: Path) -> None:
    driver = Driver(make_study(tmp_path), tmp_path)
    seconds: list[list[float]] = []
    promoted = -1
    for index in range(4):
        suggestion = driver.searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        promoted = suggestion["number"]
        driver.searcher.on_trial_result(str(index), {"resources_held": True})
        driver._train(str(index), suggestion, lambda point: False)
        seconds.append([trial.user_attrs["worker_s"] for trial in driver.store.all_trials()])
    assert len(assignments(driver.store.all_trials()[promoted])) == 2
    assert seconds[3][promoted] > seconds[2][promoted] > 0
    assert sum(seconds[3]) == pytest.approx(driver.searcher._budget.hours * 3600)


class Scripted:
    """A strategy that follows a list of decisions."""

    def __init__(self, *decisions: Decision | None) -> None:
        self.decisions = list(decisions)
        self.asked = 0

    def next(self, trials: Any, num_new: int) -> Decision | None:
        self.asked += 1
        return self.decisions.pop(0) if self.decisions else None

    def should_continue(self, number: int, epoch: int, scores: Any) -> bool:
        return True

    def expectation(self, trials: Any) -> dict[int, float]:
        return {}

    def describe(self) -> list[str]:
        return []


def test_starting_points_are_trained_to_their_end_before_the_strategy_is_asked(tmp_path: Path) -> None:
    strategy = Scripted(NewTrial(1, "first rung"))
    driver = Driver(make_study(tmp_path, start_from=[{}, {"masking.ratio": 0.7}]), tmp_path, strategy)
    assert driver.run()
    assert driver.pieces == [(0, EPOCHS), (1, EPOCHS), (2, 1)]
    assert [assignments(trial)[0]["reason"] for trial in driver.store.all_trials()] == [
        "starting point",
        "starting point",
        "first rung",
    ]


def test_an_idle_strategy_is_not_asked_again_before_something_changes(tmp_path: Path) -> None:
    strategy = Scripted(NewTrial(2, "first rung"))
    store = TrialStore(make_study(tmp_path), tmp_path)
    searcher = StudySearcher(Budget(store), lambda event: None, lambda: 2, strategy)
    assert isinstance(searcher.suggest("a"), dict)
    for _ in range(5):
        assert searcher.suggest("b") is None
    assert strategy.asked == 2
    searcher.on_trial_result("a", result(1, 0.5))
    assert searcher.suggest("b") is None and strategy.asked == 3


def test_a_strategys_own_points_are_tried_in_their_order_and_rejected_like_others(tmp_path: Path) -> None:
    points: list[dict[str, Value]] = [
        {"masking.ratio": 0.4, "masking.strategy": "random"},
        {"masking.ratio": 0.8, "masking.strategy": "disjoint"},
    ]
    strategy = Scripted(NewTrial(1, "first", iter(points)), NewTrial(1, "second", iter(points)))
    driver = Driver(make_study(tmp_path), tmp_path, strategy)
    assert driver.run()
    trials = driver.store.all_trials()
    assert [trial.params["masking.ratio"] for trial in trials] == [0.4, 0.8]
    assert [rejection["reason"] for rejection in trials[1].user_attrs["rejections"]] == [
        "same configuration as trial 0"
    ]


def test_an_enqueued_point_that_is_not_a_starting_point_is_trained_as_the_strategy_decides(tmp_path: Path) -> None:
    driver = Driver(make_study(tmp_path), tmp_path)
    driver.store.enqueue({"masking.ratio": 0.45, "masking.strategy": "random"})
    driver.run(limit=1)
    (trial,) = driver.store.all_trials()
    assert trial.params["masking.ratio"] == 0.45 and driver.pieces == [(0, 1)]
    assert status_of(trial) is TrialStatus.PAUSED


def test_a_copy_starts_from_its_parents_folder_also_after_a_restart(tmp_path: Path) -> None:
    point: dict[str, Value] = {"masking.ratio": 0.4, "masking.strategy": "random"}
    strategy = Scripted(NewTrial(3, "first", iter([point])), NewTrial(5, "copies trial 0", iter([point]), parent=0))
    driver = Driver(make_study(tmp_path, num_trials=1), tmp_path, strategy)
    driver.run(limit=1)
    suggestion = driver.searcher.suggest("copy")
    assert isinstance(suggestion, dict)
    assert (suggestion["number"], suggestion["until"]) == (1, 5)
    assert suggestion["parent_dir"] == str(driver.store.run_dir(0))
    copy = driver.store.all_trials()[1]
    assert assignments(copy) == [{"from": 3, "until": 5, "reason": "copies trial 0"}]
    assert len(driver.store.explored()) == 1
    assert Driver(make_study(tmp_path, num_trials=1), tmp_path, Scripted()).searcher.suggest("again") == suggestion


def test_a_paused_trial_whose_configuration_is_no_longer_allowed_is_stopped(tmp_path: Path) -> None:
    space = {"optim.batch_size": {"int": [8, 24], "step": 4}}
    strategy = Scripted(NewTrial(1, "first rung", iter([{"optim.batch_size": 12}])))
    Driver(make_study(tmp_path, space, num_trials=1), tmp_path, strategy).run()
    strategy = Scripted(Resume(0, 3, "the best"))
    later = Driver(make_study(tmp_path, space, num_trials=1, workers_per_trial=8), tmp_path, strategy)
    assert later.run() and later.pieces == []
    (trial,) = later.store.all_trials()
    assert trial.state is TrialState.PRUNED
    assert "optim.batch_size must be a multiple of search.workers_per_trial" in trial.user_attrs["stopped"]


def test_stops_do_not_end_a_search_while_its_budget_lasts(tmp_path: Path) -> None:
    strategy = Scripted(NewTrial(1, "first rung"), Stop(0, "the worst"), NewTrial(1, "first rung"))
    driver = Driver(make_study(tmp_path, num_trials=2), tmp_path, strategy)
    assert driver.run()
    assert [status_of(trial) for trial in driver.store.all_trials()] == [TrialStatus.PRUNED, TrialStatus.PAUSED]
