"""Population based training, driven by a simulated search: what is copied, what is replaced, and that nothing is lost."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from csmae.config import ConfigError
from csmae.settings import flatten, merge
from csmae.study.study import Study, load_study
from csmae.trial_status import TrialStatus
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, Stop, TrialView
from csmae.tuning.strategy.pbt import PopulationBased, num_replaced

RUNNING, PAUSED, COMPLETE = TrialStatus.RUNNING, TrialStatus.PAUSED, TrialStatus.COMPLETE

SPACE = {"masking.ratio": {"float": [0.05, 0.95]}, "masking.strategy": {"choice": ["identical", "random", "disjoint"]}}


def make_study(folder: Path, num_trials: int = 8, space: Any = SPACE, base: Any = None, **search: Any) -> Study:
    content = {
        "base": merge({"train": {"epochs": 20}, "optim": {"warmup_epochs": 0}}, dict(flatten(base or {}))),
        "space": space,
        "search": {"strategy": "pbt", "num_trials": num_trials, **search},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def lesson(ratio: float, progress: float) -> float:
    """What an epoch teaches: at most 1."""
    return 1 - (ratio - progress) ** 2


@dataclass
class Simulation:
    """A search with a simulated clock. The best masking ratio grows during a training, so that no constant one is the best."""

    study: Study
    num_workers: int
    seed: int = 0
    failing: frozenset[int] = frozenset()
    """Numbers of trials that fail in their first epoch."""
    trials: dict[int, TrialView] = field(default_factory=dict)
    learned: dict[int, float] = field(default_factory=dict)
    """What the checkpoint of each trial has learned."""
    starts: dict[int, int] = field(default_factory=dict)
    """Epoch at which each copy starts."""
    log: list[Decision] = field(default_factory=list)
    idle_s: float = 0.0
    now: float = 0.0

    def run(self) -> None:
        """Run until nothing runs and the strategy has nothing to do."""
        self.random, self.events = random.Random(self.seed), list[tuple[float, int]]()
        self.points = self.study.space.samples(self.seed)
        while self._fill_workers():
            then, number = heapq.heappop(self.events)
            self.idle_s += (self.num_workers - len(self.events) - 1) * (then - self.now)
            self.now = then
            self._train_epoch(number)

    def _fill_workers(self) -> bool:
        while len(self.events) < self.num_workers and (decision := self._decide()):
            self.log.append(decision)
            if isinstance(decision, Stop):
                assert self.trials[decision.number].status is PAUSED
                self._update(decision.number, status=TrialStatus.PRUNED)
            else:
                self._start(decision)
        return bool(self.events)

    def _decide(self) -> Decision | None:
        views = list(self.trials.values())
        num_new = self.study.search.num_trials - sum(trial.parent is None for trial in views)
        decision, again = (PopulationBased(self.study).next(views, num_new) for _ in range(2))
        if isinstance(decision, NewTrial) and isinstance(again, NewTrial):
            points = [list(one.points) if one.points else [] for one in (decision, again)]
            assert points[0] == points[1], "a restarted search draws the same points"
            decision = replace(decision, points=iter(points[0]) if points[0] else None)
            again = replace(again, points=decision.points)
        assert decision == again
        return decision

    def _start(self, decision: NewTrial | Resume) -> None:
        number = decision.number if isinstance(decision, Resume) else len(self.trials)
        if isinstance(decision, NewTrial) and decision.parent is None:
            self.trials[number] = TrialView(
                number, next(self.points), RUNNING, self.study.max_epochs, until=decision.until
            )
            self.learned[number] = 0.0
        elif isinstance(decision, NewTrial):
            assert decision.parent is not None and decision.points is not None
            parent = self.trials[decision.parent]
            assert parent.status is PAUSED, "the checkpoint of a running trial moves on"
            view = TrialView(
                number,
                next(decision.points),
                RUNNING,
                parent.epochs,
                parent.trained,
                decision.until,
                parent=parent.number,
            )
            self.trials[number], self.starts[number] = view, parent.trained
        else:
            assert self.trials[number].status is PAUSED
            self._check_copies(number)
            self._update(number, status=RUNNING, until=decision.until)
        heapq.heappush(self.events, (self.now + self.random.uniform(0.5, 1.5), number))

    def _check_copies(self, parent: int) -> None:
        """A trial resumes only when its copies have read its checkpoint."""
        for trial in self.trials.values():
            assert trial.parent != parent or trial.number in self.learned or trial.status is not RUNNING

    def _train_epoch(self, number: int) -> None:
        trial = self.trials[number]
        if number in self.failing:
            self._update(number, status=TrialStatus.FAIL)
            return
        if trial.parent is not None and number not in self.learned:
            assert self.trials[trial.parent].trained == self.starts[number], "the checkpoint is the one that was chosen"
            self.learned[number] = self.learned[trial.parent]
        epoch = trial.trained + 1
        self.learned[number] += lesson(float(trial.point["masking.ratio"]), epoch / trial.epochs)  # type: ignore[arg-type]
        status = RUNNING if epoch < trial.until else PAUSED if epoch < trial.epochs else COMPLETE
        self._update(number, trained=epoch, scores={**trial.scores, epoch: (self.learned[number],)}, status=status)
        if status is RUNNING:
            heapq.heappush(self.events, (self.now + self.random.uniform(0.5, 1.5), number))

    def _update(self, number: int, **changes: Any) -> None:
        self.trials[number] = replace(self.trials[number], **changes)

    @property
    def complete(self) -> list[TrialView]:
        return [trial for trial in self.trials.values() if trial.status is COMPLETE]

    @property
    def best(self) -> float:
        return max(trial.scores[trial.epochs][0] for trial in self.complete)


def copies(log: list[Decision]) -> list[NewTrial]:
    return [decision for decision in log if isinstance(decision, NewTrial) and decision.parent is not None]


def test_a_schedule_results_that_no_constant_value_can_equal(tmp_path: Path) -> None:
    constant = max(sum(lesson(v / 100, epoch / 20) for epoch in range(1, 21)) for v in range(101))
    for seed in range(5):
        simulation = Simulation(make_study(tmp_path, num_trials=16, seed=seed), num_workers=4, seed=seed)
        simulation.run()
        assert simulation.best > constant


@given(
    workers=st.integers(1, 12),
    num_trials=st.integers(2, 10),
    interval=st.integers(1, 7),
    quantile=st.floats(0.01, 0.5),
    seed=st.integers(0, 1000),
    failing=st.frozensets(st.integers(0, 15), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_every_search_ends_with_its_population_complete(
    tmp_path_factory: pytest.TempPathFactory,
    workers: int,
    num_trials: int,
    interval: int,
    quantile: float,
    seed: int,
    failing: frozenset[int],
) -> None:
    pbt = {"interval": interval, "quantile": quantile}
    study = make_study(tmp_path_factory.mktemp("study"), num_trials, pbt=pbt, seed=seed)
    simulation = Simulation(study, workers, seed, failing)
    simulation.run()
    statuses = [trial.status for trial in simulation.trials.values()]
    assert PAUSED not in statuses and RUNNING not in statuses
    members = [trial for trial in simulation.trials.values() if trial.parent is None]
    assert len(members) == num_trials
    stopped, copied = statuses.count(TrialStatus.PRUNED), len(copies(simulation.log))
    assert copied <= stopped + sum(trial.number in failing for trial in members)
    assert len(simulation.complete) <= num_trials
    assert simulation.complete or failing
    for trial in simulation.trials.values():
        assert set(trial.scores) == set(range(simulation.starts.get(trial.number, 0) + 1, trial.trained + 1))


def test_one_worker_replaces_the_worst_quarter_by_copies_of_the_best_at_every_pause(tmp_path: Path) -> None:
    simulation = Simulation(make_study(tmp_path, num_trials=8, pbt={"interval": 5}), num_workers=1)
    simulation.run()
    assert len(copies(simulation.log)) == 3 * num_replaced(8, 0.25) == 6
    assert len(simulation.complete) == 8
    for epoch in (5, 10, 15):
        scores = {t.number: t.scores[epoch][0] for t in simulation.trials.values() if epoch in t.scores}
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        assert len(ranked) == 8
        assert {n for n in ranked if simulation.trials[n].trained == epoch} == set(ranked[-2:])
        parents = {simulation.trials[n].parent for n, start in simulation.starts.items() if start == epoch}
        assert parents <= set(ranked[:2])
    assert simulation.idle_s == 0


def test_no_worker_waits_before_the_last_pieces_if_the_population_is_twice_as_large(tmp_path: Path) -> None:
    simulation = Simulation(make_study(tmp_path, num_trials=8), num_workers=4)
    simulation.run()
    assert simulation.idle_s < 4 * 2 * 1.5, "no longer than the last piece of two epochs takes"
    assert len(copies(simulation.log)) > 10


def test_a_population_that_trains_at_once_is_replaced_too(tmp_path: Path) -> None:
    simulation = Simulation(make_study(tmp_path, num_trials=8), num_workers=8)
    simulation.run()
    assert len(copies(simulation.log)) > 8
    assert len(simulation.complete) >= 7


def view(number: int, score: float, trained: int = 2, **fields: Any) -> TrialView:
    point = {"masking.ratio": 0.1 * (number + 1), "masking.strategy": "random"}
    usual = {"point": point, "status": PAUSED, "epochs": 20, "trained": trained, "scores": {2: (score,)}}
    return TrialView(number, **{**usual, **fields})


def decisions(study: Study, trials: list[TrialView]) -> Iterator[Decision]:
    """What is decided about paused trials while none of those that start reports anything."""
    strategy = PopulationBased(study)
    while decision := strategy.next(trials, 0):
        yield decision
        if isinstance(decision, NewTrial):
            assert decision.points is not None and decision.parent is not None
            copy = replace(
                view(len(trials), 0), scores={}, status=RUNNING, parent=decision.parent, until=decision.until
            )
            trials = [*trials, replace(copy, point=next(decision.points))]
        else:
            status = TrialStatus.PRUNED if isinstance(decision, Stop) else RUNNING
            trials = [replace(t, status=status) if t.number == decision.number else t for t in trials]


def test_what_decides_nothing_continues_first_and_the_best_last(tmp_path: Path) -> None:
    trials = [view(0, 0.5), view(1, 0.1), view(2, 0.9), view(3, 0.4)]
    study = make_study(tmp_path, num_trials=4)
    made = list(decisions(study, trials))
    assert made[0] == Resume(0, 4, "place 2 of 4 at epoch 2")
    assert made[1] == Resume(3, 4, "place 3 of 4 at epoch 2")
    assert made[2] == Stop(1, "place 4 of 4 at epoch 2: a copy of a better one replaces it")
    copy = made[3]
    assert isinstance(copy, NewTrial)
    assert (copy.parent, copy.until, copy.reason) == (2, 4, "copy of trial 2, place 1 of 4 at epoch 2")
    assert len(made) == 4, "the parent waits until the copy has read its checkpoint"
    running = [replace(t, status=RUNNING) for t in (trials[0], trials[3])]
    copied = view(4, 0.95, trained=3, parent=2, status=RUNNING, until=4, scores={3: (0.95,)})
    later = [*running, replace(trials[1], status=TrialStatus.PRUNED), trials[2], copied]
    assert PopulationBased(study).next(sorted(later, key=lambda t: t.number), 0) == Resume(
        2, 4, "place 1 of 4 at epoch 2"
    )


def test_the_first_at_an_epoch_are_not_judged_by_chance(tmp_path: Path) -> None:
    running = [view(n, 0, trained=1, status=RUNNING, scores={}) for n in (2, 3)]
    made = list(decisions(make_study(tmp_path, num_trials=4), [view(0, 0.5), view(1, 0.1), *running]))
    assert [type(decision) for decision in made] == [Resume, Resume]


def test_starting_points_are_never_replaced_and_may_be_copied(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=4)
    worst = [view(0, 0.1, never_stop=True), view(1, 0.3), view(2, 0.9), view(3, 0.4)]
    assert not any(isinstance(decision, Stop) for decision in decisions(study, worst))
    best = [view(0, 1.0, never_stop=True), view(1, 0.3), view(2, 0.9), view(3, 0.4)]
    assert [decision.parent for decision in copies(list(decisions(study, best)))] == [0]


def test_trials_that_violate_a_constraint_are_worse_than_all_others(tmp_path: Path) -> None:
    trials = [view(0, 0.5), view(1, 0.1), view(2, 0.9, violation=2.0), view(3, 0.4)]
    made = list(decisions(make_study(tmp_path, num_trials=4), trials))
    assert [d.number for d in made if isinstance(d, Stop)] == [2]
    assert [d.parent for d in copies(made)] == [0]


def test_several_objectives_are_compared_by_front(tmp_path: Path) -> None:
    scores = [(0.5, -3.0), (0.4, -4.0), (0.9, -1.0), (0.4, -3.0)]
    trials = [view(number, 0, scores={2: values}) for number, values in enumerate(scores)]
    made = list(decisions(make_study(tmp_path, num_trials=4), trials))
    assert [d.number for d in made if isinstance(d, Stop)] == [1]
    assert [d.parent for d in copies(made)] == [2]


def test_a_score_that_is_not_finite_is_the_worst(tmp_path: Path) -> None:
    trials = [view(0, 0.5), view(1, 0.1), view(2, 0, scores={}), view(3, 0.4)]
    made = list(decisions(make_study(tmp_path, num_trials=4), trials))
    assert [d.number for d in made if isinstance(d, Stop)] == [2]


def test_copies_of_one_parent_have_different_points_until_there_is_none_left(tmp_path: Path) -> None:
    space = {"masking.strategy": {"choice": ["random", "disjoint"]}}
    study = make_study(tmp_path, num_trials=8, space=space)
    point = {"masking.strategy": "random"}
    trials = [view(n, 0.1 * n, point=point) for n in range(8)]
    trials[:2] = [replace(trial, status=TrialStatus.PRUNED) for trial in trials[:2]]
    made = list(decisions(study, trials))
    assert [d.parent for d in copies(made)] in ([6, 7], [7, 6])
    trials = [replace(t, status=TrialStatus.PRUNED) if t.number == 6 else t for t in trials]
    assert len(copies(list(decisions(study, trials)))) == 1, "another copy of trial 7 would train the same"


def test_paused_members_are_expected_to_be_resumed_in_the_order_of_their_scores(tmp_path: Path) -> None:
    trials = [view(0, 0.5), view(1, 0.1), view(2, 0.9, status=RUNNING), view(3, 0.4)]
    expected = PopulationBased(make_study(tmp_path)).expectation(trials)
    assert sorted(expected, key=expected.__getitem__) == [1, 3, 0]


def test_the_strategy_explains_itself(tmp_path: Path) -> None:
    lines = PopulationBased(make_study(tmp_path, num_trials=8)).describe()
    assert lines[0] == "A population of 8 trials trains 2 of 20 epochs at a time."
    assert "up to 18 copies" in lines[1] and "masking.ratio, masking.strategy" in lines[1]
    assert lines[2].startswith("160 epochs in all")


@pytest.mark.parametrize(("every", "interval", "expected"), [(1, None, 2), (3, None, 3), (3, 4, 6), (1, 7, 7)])
def test_pauses_are_at_epochs_that_are_scored(tmp_path: Path, every: int, interval: int | None, expected: int) -> None:
    study = make_study(tmp_path, pbt={"interval": interval}, base={"eval": {"every": every}})
    decision = PopulationBased(study).next([], 8)
    assert decision == NewTrial(expected, "member of the population")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"num_trials": 1},
            "search.strategy pbt replaces trials by copies of others: search.num_trials must be at least 2",
        ),
        (
            {"pbt": {"interval": 20}},
            "search.pbt.interval, a multiple of eval.every, must be smaller than train.epochs 20: found 20",
        ),
        (
            {"pbt": {"interva": 20}},
            "'search.pbt.interva' is not a setting of the search; did you mean 'search.pbt.interval'?",
        ),
        ({"disk_limit": "50GB"}, "pbt needs the checkpoints of all 8 trials: remove search.disk_limit"),
        ({"pbt": {"quantile": 0.6}}, "search.pbt.quantile: input should be less than or equal to 0.5"),
        (
            {"space": {"model.decoder_depth": {"int": [1, 4]}}},
            "and model.decoder_depth cannot change then: set it in 'base'",
        ),
        ({"space": {"train.epochs": {"int": [10, 40]}}}, "and train.epochs cannot change then"),
        ({"space": {"optim.batch_size": {"choice": [64, 128]}}}, "and optim.batch_size cannot change then"),
        ({"space": {"train.compile": {"choice": [True, False]}}}, "and train.compile cannot change then"),
        (
            {"space": {"loss.mim_weight": {"float": [0.0, 1.0]}}, "base": {"loss": {"mde_weight": 0}}},
            "loss.mim_weight may be 0",
        ),
        ({"base": {"train": {"changes": [{"after_epoch": 2}]}}}, "remove train.changes from the base"),
    ],
)
def test_a_study_that_cannot_be_trained_so_is_rejected_in_one_line(
    tmp_path: Path, fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_study(tmp_path, **fields)
    (line,) = str(caught.value).splitlines()
    assert text in line


def test_a_weight_may_be_zero_if_the_network_stays_the_same(tmp_path: Path) -> None:
    make_study(tmp_path, space={"loss.mim_weight": {"float": [0.0, 1.0]}}, base={"loss": {"mde_weight": 1}})
