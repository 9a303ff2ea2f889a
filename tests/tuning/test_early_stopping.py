"""Early stopping: ASHA, hyperband and the median rule, and the order of several objectives."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from csmae.study.study import load_study
from csmae.trials.pareto import pareto_ranks
from csmae.trials.store import TrialStore
from csmae.tuning.early_stopping import Asha, Hyperband, Median, bracket_weights, make_stopping_rule
from tests.study.test_study import BASE, write
from tests.tuning.test_searcher import SPACE, make_study

pytestmark = pytest.mark.usefixtures("copied_database")


@pytest.mark.parametrize("rule", [Asha(1, 3), Median(1)])
def test_an_epoch_reported_twice_gets_the_same_decision(rule: Asha | Median) -> None:
    decisions = []
    for number, score in enumerate((0.5, 0.4, 0.9, 0.1)):
        decisions.append(rule.should_continue(number, 1, (score,)))
        assert rule.should_continue(number, 1, (score,)) == decisions[-1]
    assert set(decisions) == {True, False}


def test_an_epoch_reported_twice_counts_once_in_the_mean() -> None:
    median = Median(1)
    for number in range(3):
        for epoch, score in ((1, 0.1), (2, 0.9), (2, 0.9)):
            median.should_continue(number, epoch, (score,))
    assert median.should_continue(3, 2, (0.55,)) and not median.should_continue(4, 2, (0.45,))


def test_asha_keeps_the_best_third_at_each_rung() -> None:
    asha = Asha(grace_epochs=1, reduction=3)
    scores = np.random.default_rng(0).permutation(300) / 300
    kept = [float(score) for number, score in enumerate(scores) if asha.should_continue(number, 1, (float(score),))]
    assert 90 <= len(kept) <= 130
    assert set(np.sort(scores)[-80:]) <= set(kept)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_asha_never_stops_the_best_so_far_and_judges_once_per_rung(scores: list[float], reduction: int) -> None:
    asha = Asha(2, reduction)
    for number, score in enumerate(scores):
        assert asha.should_continue(number, 1, (score,))
        kept = asha.should_continue(number, 2, (score,))
        assert kept or score < max(scores[:number])
        assert asha.should_continue(number, 3, (0.0,))


def test_asha_judges_at_the_rungs_or_later_if_a_score_is_missing() -> None:
    asha = Asha(1, 3)
    asha.should_continue(0, 1, (0.9,))
    asha.should_continue(0, 3, (0.9,))
    assert not asha.should_continue(1, 1, (0.1,))
    assert not asha.should_continue(2, 4, (0.1,))


@pytest.mark.parametrize(
    ("epochs", "grace", "reduction", "weights"),
    [
        (81, 1, 3, [5, 8, 15, 34, 81]),  # table 1 of the paper
        (27, 3, 3, [3, 5, 9]),
        (9, 2, 4, [2, 4]),
        (3, 2, 3, [1]),
    ],
)
def test_hyperband_starts_as_many_trials_in_each_bracket_as_the_paper(
    epochs: int, grace: int, reduction: int, weights: list[int]
) -> None:
    assert bracket_weights(epochs, grace, reduction) == weights
    rule, period = Hyperband(epochs, grace, reduction), sum(weights)
    late = [rule.bracket(number) for number in range(period, 2 * period)]
    early = [Hyperband(epochs, grace, reduction).bracket(number) for number in range(period)]
    assert [early.count(bracket) for bracket in range(len(weights))] == weights
    assert late == early


def test_every_prefix_of_the_trials_is_spread_over_hyperbands_brackets() -> None:
    rule, weights = Hyperband(81, 1, 3), [5, 8, 15, 34, 81]
    assigned = [rule.bracket(number) for number in range(200)]
    for count in range(1, 200):
        for bracket, weight in enumerate(weights):
            assert abs(assigned[:count].count(bracket) - count * weight / 143) < 1.5


@pytest.mark.parametrize(("epochs", "rungs"), [(27, [1, 3, 9]), (10, [1, 3]), (50, [2, 6, 17])])
def test_each_bracket_of_hyperband_starts_one_rung_later_and_the_last_one_stops_none(
    epochs: int, rungs: list[int]
) -> None:
    rule = Hyperband(epochs, 1, 3)
    first_stops: dict[int, int] = {}
    for number in range(150):  # each trial is worse than all earlier ones
        bracket = rule.bracket(number)
        for epoch in range(1, epochs):
            if not rule.should_continue(number, epoch, (-float(number),)):
                first_stops.setdefault(bracket, epoch)
                break
    assert first_stops == dict(enumerate(reversed(rungs), start=1))


def test_trials_of_different_brackets_of_hyperband_are_not_compared() -> None:
    rule = Hyperband(9, 1, 3)
    by_bracket = [next(n for n in range(20) if rule.bracket(n) == bracket) for bracket in range(3)]
    assert all(rule.should_continue(number, 3, (0.9 - bracket,)) for bracket, number in enumerate(by_bracket))


def test_median_stops_below_the_median_of_means_and_not_before_its_grace_period() -> None:
    median = Median(grace_epochs=2)
    for number, score in enumerate((0.5, 0.6, 0.7)):
        for epoch in (1, 2, 3):
            assert median.should_continue(number, epoch, (score,))
    assert median.should_continue(3, 1, (0.1,))
    assert not median.should_continue(3, 2, (0.1,))
    assert median.should_continue(4, 2, (0.65,))


def test_asha_with_several_objectives_keeps_the_pareto_front() -> None:
    asha = Asha(1, 2)
    front = [(0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (0.7, 0.3)]
    for number, point in enumerate(front):
        asha.should_continue(number, 1, point)
    for number, point in enumerate([(0.05, 0.05), (0.4, 0.4)], start=10):
        assert not asha.should_continue(number, 1, point)
    assert asha.should_continue(20, 1, (0.95, 0.95))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=25))
@settings(max_examples=80, deadline=None)
def test_pareto_fronts_agree_with_their_definition(points: list[tuple[int, int]]) -> None:
    ranks, left, rank = pareto_ranks(points), set(range(len(points))), 0
    while left:
        front = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        assert {int(i) for i in np.flatnonzero(ranks == rank)} == front
        left, rank = left - front, rank + 1


def dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def test_a_rule_made_from_the_trial_store_decides_like_one_that_saw_all_epochs(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    study = make_study(tmp_path, num_trials=40)
    trial_store, seen = TrialStore(study, tmp_path), Asha(1, 3)
    for curve in generator.random((20, 9)).tolist():
        trial = trial_store.ask()
        study.space.suggest(trial)
        for epoch, score in enumerate(curve, start=1):
            trial_store.record_epoch(trial, epoch, (score,))
            if not seen.should_continue(trial.number, epoch, (score,)):
                trial_store.prune(trial)
                break
        else:
            trial_store.complete(trial, (curve[-1],))
    restored = make_stopping_rule(study.search, TrialStore(study, tmp_path).curves(), study.max_epochs)
    assert restored is not None
    for number, (epoch, score) in enumerate(((1, 0.2), (1, 0.5), (1, 0.9), (3, 0.6), (9, 0.9)), start=100):
        assert seen.should_continue(number, epoch, (score,)) == restored.should_continue(number, epoch, (score,))


@pytest.mark.parametrize(
    ("epochs", "grace", "judged"), [(9, 3, {3}), (9, None, {1, 3}), (28, 1, {1, 3, 9}), (3, 3, set())]
)
def test_every_bracket_of_hyperband_but_one_can_stop_trials(
    tmp_path: Path, epochs: int, grace: int | None, judged: set[int]
) -> None:
    base = {**BASE, "train": {"epochs": epochs}}
    study = load_study(write(tmp_path, SPACE, base=base, strategy="hyperband", grace_epochs=grace))
    rule = make_stopping_rule(study.search, TrialStore(study, tmp_path).curves(), study.max_epochs)
    assert isinstance(rule, Hyperband)
    stopped = set()
    for number in range(60):
        stops = (e for e in range(1, epochs) if not rule.should_continue(number, e, (-float(number),)))
        stopped.add(next(stops, None))
    assert stopped == judged | {None}


def test_median_stops_no_trial_before_three_others_have_reached_the_same_epoch() -> None:
    median = Median(1)
    for number in range(3):
        assert median.should_continue(number, 1, (0.9 - 0.1 * number,))
    assert not median.should_continue(3, 1, (0.5,))
