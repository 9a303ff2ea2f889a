"""The default strategy, on synthetic learning curves: no Ray, no database."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from csmae.settings import flatten, parse_config, validate
from csmae.study.options import Search
from csmae.study.space import Space
from csmae.study.study import NESTED_SETTINGS, Study
from csmae.trial_status import TrialStatus
from csmae.trials.pareto import hypervolume_order
from csmae.tuning.strategy.auto import AutoStrategy
from csmae.tuning.strategy.base import Decision, NewTrial, Resume, TrialView
from csmae.tuning.strategy.forecast import RungTable, rung_epochs
from csmae.tuning.strategy.gaussian_process import IncrementProcess
from csmae.tuning.strategy.quality import normal_scores

EPOCHS = 27

DOMAINS: dict[str, Any] = {
    "masking.ratio": {"float": [0.1, 0.9]},
    "loss.mim_weight": {"float": [0.0, 4.0]},
    "loss.temperature": {"float": [0.05, 1.0], "log": True, "when": {"loss.mim_weight": "> 2"}},
    "model.pooling": {"choice": ["mean", "cls"]},
}


def make_study(epochs: int = EPOCHS, **settings: Any) -> Study:
    base: dict[str, Any] = {"train": {"epochs": epochs}, "optim": {"warmup_epochs": 0}}
    values = dict(flatten(parse_config(base, "base").model_dump(mode="json")))
    domains = {name: entry for name, entry in DOMAINS.items() if name in values}
    search = validate(Search, {"strategy": "auto", "sampler": "auto", "num_trials": 60, **settings}, NESTED_SETTINGS)
    return Study("synthetic", base, Space.parse(domains, values), search)


def make_strategy(study: Study, cost: float = 1.0) -> AutoStrategy:
    return AutoStrategy(study, lambda point: cost)


def quality(point: Mapping[str, Any]) -> float:
    """The final score of a point, in (0, 1]."""
    return math.exp(-3 * (point["masking.ratio"] - 0.7) ** 2 - 0.3 * (point["loss.mim_weight"] - 1) ** 2)


def is_cheap(point: Mapping[str, Any]) -> bool:
    return bool(point["masking.ratio"] > 0.5)


def score(point: Mapping[str, Any], epoch: int) -> float:
    return quality(point) * (1 - 0.5 * 0.8**epoch)


class Simulation:
    """One worker that trains what the strategy decides; ``score`` is what an epoch reports."""

    def __init__(self, study: Study, strategy: AutoStrategy | None = None) -> None:
        self.study, self.strategy = study, strategy or make_strategy(study)
        self.trials: list[TrialView] = []
        self.decisions: list[Decision] = []
        self.epochs = 0

    def step(self) -> bool:
        num_new = self.study.search.num_trials - len(self.trials)
        decision = self.strategy.next(self.trials, num_new)
        if decision is None:
            return False
        self.decisions.append(decision)
        if isinstance(decision, NewTrial):
            assert decision.points is not None
            point = next(decision.points)
            number, until = len(self.trials), decision.until
            self.trials.append(TrialView(number, point, TrialStatus.PAUSED, self.study.max_epochs))
        else:
            assert isinstance(decision, Resume)
            number, until = decision.number, decision.until
        self._train(number, until)
        return True

    def _train(self, number: int, until: int) -> None:
        trial = self.trials[number]
        assert trial.status is TrialStatus.PAUSED
        assert trial.trained < until <= trial.epochs
        scores = {epoch: (score(trial.point, epoch),) for epoch in range(1, until + 1)}
        status = TrialStatus.COMPLETE if until == trial.epochs else TrialStatus.PAUSED
        self.epochs += until - trial.trained
        self.trials[number] = replace(trial, trained=until, until=until, scores=scores, status=status)

    def run(self) -> None:
        while self.step():
            assert len(self.decisions) < 1000

    def best(self) -> float:
        return max(quality(trial.point) for trial in self.trials if trial.status is TrialStatus.COMPLETE)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 3, 1, 50), [1, 3, 9, 27, 50]),
        ((1, 3, 1, 4), [1, 4]),
        ((1, 3, 1, 1), [1]),
        ((1, 3, 2, 30), [2, 4, 10, 30]),
        ((2, 2, 1, 16), [2, 4, 8, 16]),
        ((1, 3, 10, 12), [12]),
    ],
)
def test_rungs_are_multiples_of_the_epochs_with_scores(
    arguments: tuple[int, int, int, int], expected: list[int]
) -> None:
    assert rung_epochs(*arguments) == expected


def test_trials_pause_at_rungs_and_the_search_ends_with_the_best_trial_complete() -> None:
    simulation = Simulation(make_study())
    simulation.run()
    rungs = {1, 3, 9, EPOCHS}
    assert {trial.trained for trial in simulation.trials} <= rungs
    assert len(simulation.trials) == 60
    assert simulation.epochs < 0.4 * 60 * EPOCHS
    last_scores = {trial.number: score(trial.point, trial.trained) for trial in simulation.trials}
    complete = [trial for trial in simulation.trials if trial.status is TrialStatus.COMPLETE]
    assert 2 <= len(complete) <= 20
    best = max(complete, key=lambda trial: last_scores[trial.number])
    assert all(last_scores[best.number] >= one for one in last_scores.values())


def test_it_finds_better_trials_than_random_search_with_as_many_epochs() -> None:
    found, drawn = [], []
    for seed in range(5):
        simulation = Simulation(make_study(seed=seed))
        simulation.run()
        found.append(simulation.best())
        points = simulation.study.space.samples(seed)
        drawn.append(max(quality(next(points)) for _ in range(simulation.epochs // EPOCHS)))
    assert np.mean(found) > np.mean(drawn)
    assert np.median(found) > 0.97


def test_a_restarted_search_decides_as_an_uninterrupted_one() -> None:
    simulation, study = Simulation(make_study()), make_study()
    for _ in range(70):
        trials, num_new = list(simulation.trials), 60 - len(simulation.trials)
        again = make_strategy(study).next(trials, num_new)
        assert simulation.step()
        before = simulation.decisions[-1]
        assert type(again) is type(before)
        assert (again.until, again.reason) == (before.until, before.reason)  # type: ignore[union-attr]
        if isinstance(again, NewTrial):
            assert again.points is not None
            assert next(again.points) == simulation.trials[-1].point


def test_an_explicit_sampler_proposes_the_points() -> None:
    strategy = make_strategy(make_study(sampler="random"))
    decision = strategy.next([], 10)
    assert isinstance(decision, NewTrial)
    assert decision.points is None


def test_failed_and_infeasible_trials_are_never_continued() -> None:
    simulation = Simulation(make_study())
    for _ in range(25):
        simulation.step()
    best = max(simulation.trials, key=lambda trial: score(trial.point, trial.trained))
    for change in ({"status": TrialStatus.FAIL}, {"violation": 1.0}):
        trials = list(simulation.trials)
        trials[best.number] = replace(best, **change, trained=1)
        for _ in range(10):
            decision = make_strategy(simulation.study).next(trials, 0)
            if not isinstance(decision, Resume):
                break
            assert decision.number != best.number
            resumed = trials[decision.number]
            trials[decision.number] = replace(resumed, trained=EPOCHS, status=TrialStatus.COMPLETE)


def test_all_failed_trials_leave_nothing_to_continue() -> None:
    trials = [TrialView(n, {"masking.ratio": 0.5}, TrialStatus.FAIL, EPOCHS, trained=0) for n in range(6)]
    strategy = make_strategy(make_study())
    assert strategy.next(trials, 0) is None
    assert isinstance(strategy.next(trials, 3), NewTrial)


def test_a_trial_is_finished_early_even_if_no_rung_promotes_it() -> None:
    simulation = Simulation(make_study(num_trials=1000))
    while simulation.epochs < 3 * EPOCHS:
        simulation.step()
    assert any(trial.status is TrialStatus.COMPLETE for trial in simulation.trials)


def test_cheap_configurations_are_preferred_at_first() -> None:
    study = make_study()
    cheap = AutoStrategy(study, lambda point: 1.0 if is_cheap(point) else 100.0)
    simulation = Simulation(study, cheap)
    for _ in range(40):
        simulation.step()
    assert np.mean([is_cheap(trial.point) for trial in simulation.trials[4:]]) > 0.7


def test_it_explains_itself() -> None:
    text = " ".join(make_strategy(make_study()).describe())
    assert "1, 3, 9" in text
    assert "60 configurations" in text


def test_several_objectives_are_ranked_by_front_and_then_by_hypervolume() -> None:
    scores = [(0.0, 1.0), (1.0, 0.0), (0.6, 0.6), (0.62, 0.58), (0.1, 0.1)]
    order = hypervolume_order(scores)
    assert order[-1] == 4
    assert set(order[:3]) == {0, 1, 2} or set(order[:3]) == {0, 1, 3}
    values = normal_scores(scores, [0, 0, 0, 0, 0])
    assert values[4] == values.min()


def test_infeasible_scores_rank_below_all_feasible_ones() -> None:
    values = normal_scores([(9.0,), (1.0,), (8.0,), (2.0,)], [0.1, 0, 5.0, 0])
    assert list(np.argsort(-values)) == [3, 1, 0, 2]


def test_the_table_holds_each_rungs_scores() -> None:
    scores = {1: (0.1,), 2: (0.2,), 3: (0.3,)}
    trials = [
        TrialView(0, {}, TrialStatus.PAUSED, 9, trained=3, scores=scores),
        TrialView(1, {}, TrialStatus.PAUSED, 9, trained=1, scores={1: (0.4,)}),
        TrialView(2, {}, TrialStatus.FAIL, 9),
    ]
    table = RungTable(trials, [1, 3, 9])
    assert table.levels.tolist() == [1, 0, -1]
    assert np.isfinite(table.scores).tolist() == [[True, True, False], [True, False, False], [True, False, False]]
    assert table.scores[1, 0] > table.scores[0, 1] > table.scores[0, 0] == table.scores[2, 0]


def test_the_increment_process_interpolates_and_is_unsure_far_away() -> None:
    random = np.random.default_rng(0)
    x = random.random((40, 2))
    below = random.normal(size=40)
    process = IncrementProcess(2, is_first=False)
    process.fit(x, below, 0.5 * below + np.sin(3 * x[:, 0]))
    prediction = process.predict(x, below)
    assert np.abs(prediction.mean - (0.5 * below + np.sin(3 * x[:, 0]))).max() < 0.5
    assert prediction.slope == pytest.approx(0.5, abs=0.1)
    far = process.predict(np.array([[3.0, 3.0]]), np.array([0.0]))
    assert far.variance[0] > 2 * prediction.variance.mean()
