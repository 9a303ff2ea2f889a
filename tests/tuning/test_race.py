"""The race of the finalists: it gives the verdict of a fixed number of seeds with fewer trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher

from csmae.study.study import Study
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.tuning.race import CHANCE, Finalist, chance_to_overtake, describe_lead, next_in_race, next_in_turn
from tests.trials.test_confirmation import SETTINGS, champion, train
from tests.tuning.test_searcher import make_searcher, make_study, result

Choose = Callable[[Sequence[Finalist]], int | None]


def simulate(choose: Choose, scores_fs: np.ndarray) -> tuple[int, int]:
    """Confirm one after the other.

    Args:
        choose: The rule.
        scores_fs: For each finalist F its own score and then that of each seed S.

    Returns:
        The champion, and how many trainings the confirmation took.
    """
    num_seeds = scores_fs.shape[1] - 1
    finalists = [Finalist(index, (float(row[0]),), num_left=num_seeds) for index, row in enumerate(scores_fs)]
    trainings = 0
    while (chosen := choose(finalists)) is not None:
        scores = tuple(map(float, scores_fs[chosen, : len(finalists[chosen].scores) + 1]))
        trained = len(scores) - 1
        finalists[chosen] = Finalist(chosen, scores, num_started=trained, num_left=num_seeds - trained)
        trainings += 1
    return max(finalists, key=lambda finalist: finalist.mean).number, trainings


def draw(random: np.random.Generator, spread: float, top: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of forty trials by one noisy score.

    Args:
        random: Source of randomness.
        spread: Standard deviation of the true scores in units of that over the seeds.
        top: Number of finalists.
        seeds: Further seeds of each.

    Returns:
        The finalists' true scores, and for each finalist its own score and that of each seed.
    """
    true = random.normal(0, spread, 40)
    own = true + random.normal(size=40)
    best = np.argsort(-own)[:top]
    return true[best], np.column_stack([own[best], true[best, None] + random.normal(size=(top, seeds))])


@pytest.mark.parametrize(("top", "seeds"), [(3, 3), (5, 5)])
@pytest.mark.parametrize(("spread", "most"), [(0.5, 0.9), (1.0, 0.8), (3.0, 0.6), (10.0, 0.5)])
def test_the_race_finds_champions_as_good_as_those_of_all_seeds_with_fewer_trainings(
    top: int, seeds: int, spread: float, most: float
) -> None:
    random, num_races = np.random.default_rng(7), 400
    trainings, differs, loss = 0, 0, 0.0
    for _ in range(num_races):
        true, scores = draw(random, spread, top, seeds)
        (winner, used), (expected, all_seeds) = simulate(next_in_race, scores), simulate(next_in_turn, scores)
        assert all_seeds == top * seeds
        trainings, differs = trainings + used, differs + (winner != expected)
        loss += float(true[expected] - true[winner])
    assert trainings < most * num_races * top * seeds
    assert differs < CHANCE * num_races
    assert abs(loss) / num_races < 0.03  # of the standard deviation over the seeds


def test_each_finalist_is_trained_once_before_the_race_is_decided() -> None:
    finalists = [Finalist(4, (0.9,), num_left=3), Finalist(1, (0.5,), num_left=3), Finalist(2, (0.4,), num_left=3)]
    order = []
    for _ in finalists:
        chosen = next_in_race(finalists)
        order.append(chosen)
        finalists = [
            replace(f, num_started=1, num_running=1, num_left=2) if f.number == chosen else f for f in finalists
        ]
    assert order == [4, 1, 2]
    assert next_in_race(finalists) is None  # three confirmations run, and nothing is known yet


@pytest.mark.parametrize(
    ("leader", "rival", "chosen"),
    [
        (((0.60, 0.59), 0), ((0.40, 0.41), 0), None),  # clear
        (((0.60, 0.50), 0), ((0.55, 0.52), 0), 1),  # as many seeds each: the leader
        (((0.60, 0.50, 0.58), 0), ((0.55, 0.52), 0), 2),  # the one with fewer
        (((0.60, 0.50), 1), ((0.55, 0.52), 0), 2),  # the leader's next seed runs
        (((0.60, 0.50), 1), ((0.55, 0.52), 1), None),  # the seeds of both run
        (((0.60, 0.50), 1), ((0.55, 0.52, 0.5), 0), None),  # the leader gets a third, too
        (((0.60, 0.50, 0.55, 0.56), 0), ((0.55, 0.52, 0.59, 0.54), 0), None),  # all seeds are used
    ],
)
def test_a_seed_goes_to_the_leader_or_its_rival(
    leader: tuple[tuple[float, ...], int], rival: tuple[tuple[float, ...], int], chosen: int | None
) -> None:
    finalists = []
    for number, (scores, running) in ((1, leader), (2, rival)):
        started = len(scores) - 1 + running
        finalists.append(Finalist(number, scores, running, started, 3 - started))
    assert next_in_race(finalists) == chosen


def test_a_finalist_that_is_clearly_worse_gets_no_further_seed_and_one_that_overtakes_leads() -> None:
    own = {1: (0.60, 0.50), 2: (0.57, 0.51), 3: (0.10, 0.11)}
    finalists = [Finalist(number, scores, num_started=1, num_left=8) for number, scores in own.items()]
    chosen = []
    for score in (0.46, 0.52, 0.55, 0.60, 0.52, 0.58):
        number = next_in_race(finalists)
        assert number is not None
        chosen.append(number)
        finalists = [
            replace(f, scores=(*f.scores, score), num_started=f.num_started + 1, num_left=f.num_left - 1)
            if f.number == number
            else f
            for f in finalists
        ]
    assert chosen == [1, 2, 2, 1, 1, 2]
    assert max(finalists, key=lambda finalist: finalist.mean).number == 2


def test_scores_that_all_seeds_repeat_exactly_decide_the_race() -> None:
    exact = [Finalist(n, (score, score), num_started=1, num_left=2) for n, score in ((1, 0.6), (2, 0.59))]
    assert next_in_race(exact) is None
    tie = [Finalist(n, (0.6, 0.6), num_started=1, num_left=2) for n in (1, 2)]
    assert next_in_race(tie) == 1


def test_failed_confirmations_use_up_seeds_and_an_unknown_variance_decides_nothing() -> None:
    failed = [Finalist(1, (0.6,), num_started=1, num_left=1), Finalist(2, (0.2,), num_started=1, num_left=1)]
    assert next_in_race(failed) == 1
    assert next_in_race([replace(finalist, num_started=2, num_left=0) for finalist in failed]) is None


def test_a_single_finalist_is_trained_with_all_seeds() -> None:
    alone = Finalist(1, (0.6, 0.5), num_started=1, num_left=1)
    assert next_in_race([alone]) == 1
    assert next_in_race([replace(alone, num_started=2, num_left=0)]) is None
    assert next_in_race([]) is None


def test_the_chance_to_overtake_is_that_of_simulated_seeds() -> None:
    """Known means and variance, many degrees of freedom: the t distribution is normal, and so is the mean of the seeds to come."""
    random, num_more = np.random.default_rng(0), 3
    leader, rival = Finalist(1, (0.3, 0.5), num_left=num_more), Finalist(2, (0.1, 0.3), num_left=num_more)
    means = np.array([[0.4], [0.2]]) + random.normal(size=(2, 200_000)) * np.sqrt(0.01 / 2)  # what the seeds allow
    more = means + random.normal(size=means.shape) * np.sqrt(0.01 / num_more)
    total = (np.array([[0.4], [0.2]]) * 2 + more * num_more) / (2 + num_more)
    simulated = float((total[1] > total[0]).mean())
    assert 0.004 < chance_to_overtake(leader, rival, 0.01, 100_000) == pytest.approx(simulated, rel=0.05)


# With a trial store


def raced(folder: Path, scores: list[float | None], **confirm: Any) -> tuple[Study, list[dict[str, Any]]]:
    """A study of three trials, then confirmations with these scores, each in a run of its own."""
    study = make_study(folder, num_trials=3, confirm={"top": 3, "seeds": 3, **confirm}, **SETTINGS)
    done = train(make_searcher(study, folder)[0], [0.6, 0.59, 0.3])
    for score in scores:
        done += train(make_searcher(study, folder)[0], [score])
    return study, done


@pytest.mark.usefixtures("copied_database")
def test_a_race_ends_when_the_lead_is_clear(tmp_path: Path) -> None:
    study, _ = raced(tmp_path, [0.61, 0.5, 0.3, 0.6])
    assert make_searcher(study, tmp_path)[0].suggest("more") == Searcher.FINISHED
    board = leaderboard(TrialStore(study, tmp_path).optuna_study)
    assert [(entry.trial.number, entry.num_seeds) for entry in board.entries] == [(0, 3), (1, 2), (2, 2)]
    assert describe_lead(board) == "leads trial 1 by 0.0583 ± 0.0293 over 3 seeds, of which trial 1 had 2"


@pytest.mark.usefixtures("copied_database")
def test_a_killed_race_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    scores = [0.61, 0.5, 0.3, 0.6]
    (tmp_path / "one").mkdir()
    study = make_study(tmp_path / "one", num_trials=3, confirm={"top": 3, "seeds": 3}, **SETTINGS)
    whole = train(make_searcher(study, tmp_path / "one")[0], [0.6, 0.59, 0.3, *scores])
    _, parts = raced(tmp_path, list(scores))
    assert [s["config"] for s in parts] == [s["config"] for s in whole]


@pytest.mark.usefixtures("copied_database")
@pytest.mark.parametrize(
    ("scores", "best", "verdict"),
    [
        ([], 0, "leads trial 1 by 0.0100 over 1 seed: it is not confirmed"),
        ([0.2], 1, "leads trial 0 by 0.1900 ± 0.3464 over 1 seed: it is not confirmed"),
        ([0.58], 0, "leads trial 1 by 0.0000 ± 0.0173 over 2 seeds, of which trial 1 had 1"),
        ([0.65, None, 0.3], 0, "leads trial 1 by 0.0350 ± 0.0306 over 2 seeds, of which trial 1 had 1"),
    ],
)
def test_the_verdict_stands_when_the_budget_ends_in_the_middle(
    tmp_path: Path, scores: list[float | None], best: int, verdict: str
) -> None:
    study, _ = raced(tmp_path, scores)
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("cut")
    searcher.on_trial_result("cut", result(1, 0.9))
    searcher.cut_short_trials("the time limit of 1s is reached")
    trial_store = TrialStore(study, tmp_path)
    assert champion(trial_store) == best
    assert describe_lead(leaderboard(trial_store.optuna_study)) == verdict


@pytest.mark.usefixtures("copied_database")
def test_without_a_race_each_finalist_is_trained_with_all_seeds(tmp_path: Path) -> None:
    study, _ = raced(tmp_path, [0.61, 0.5, 0.3, 0.6, 0.51, 0.3, 0.6, 0.5, 0.3], race=False)
    assert make_searcher(study, tmp_path)[0].suggest("more") == Searcher.FINISHED
    assert [e.num_seeds for e in leaderboard(TrialStore(study, tmp_path).optuna_study).entries] == [4, 4, 4]


@pytest.mark.usefixtures("copied_database")
def test_a_minimized_objective_races_towards_small_scores(tmp_path: Path) -> None:
    study = make_study(
        tmp_path, num_trials=2, objectives={"val/f1_mean": "minimize"}, confirm={"top": 2, "seeds": 3}, **SETTINGS
    )
    searcher, _ = make_searcher(study, tmp_path)
    train(searcher, [0.6, 0.1, 0.11, 0.61])
    assert searcher.suggest("more") == Searcher.FINISHED
    board = leaderboard(TrialStore(study, tmp_path).optuna_study)
    assert describe_lead(board) == "leads trial 0 by 0.5000 ± 0.0071 over 2 seeds"


@pytest.mark.usefixtures("copied_database")
def test_a_study_that_does_not_confirm_has_no_verdict(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=2, **SETTINGS)
    train(make_searcher(study, tmp_path)[0], [0.6, 0.1])
    assert describe_lead(leaderboard(TrialStore(study, tmp_path).optuna_study)) is None


@pytest.mark.usefixtures("copied_database")
def test_a_finalist_of_an_earlier_run_stays_in_the_race(tmp_path: Path) -> None:
    confirm = {"top": 1, "seeds": 2}
    study = make_study(tmp_path, num_trials=1, confirm=confirm, **SETTINGS)
    train(make_searcher(study, tmp_path)[0], [0.5, 0.52])
    more = make_study(tmp_path, num_trials=2, confirm=confirm, **SETTINGS)
    searcher, _ = make_searcher(more, tmp_path)
    seeds = [s["config"]["train"]["seed"] for s in train(searcher, [0.55, 0.4, 0.53, 0.41])]
    assert seeds == [0, 1, 2, 2]  # trial 2 is found and confirmed, then trial 0 leads and both get their second seed
    assert searcher.suggest("more") == Searcher.FINISHED
    board = leaderboard(TrialStore(more, tmp_path).optuna_study)
    assert [(entry.trial.number, entry.num_seeds) for entry in board.entries] == [(0, 3), (2, 3)]
