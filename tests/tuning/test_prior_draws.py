"""Priors in a search: a good one finds the optimum earlier, a wrong one costs little, and restarts change nothing."""

import itertools
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import optuna
import pytest

from csmae.study.encoding import Encoding
from csmae.study.study import Study, load_study
from csmae.tuning.draft import Draft
from csmae.tuning.prior_draws import draw_from_priors, order_by_priors
from tests.study.test_study import write
from tests.tuning.test_proposals import train_all
from tests.tuning.test_searcher import make_searcher, make_study

pytestmark = pytest.mark.usefixtures("copied_database")

SPACE: dict[str, dict[str, Any]] = {
    "optim.lr": {"float": [1e-5, 1e-1], "log": True},
    "optim.weight_decay": {"float": [0, 1]},
    "masking.ratio": {"float": [0.1, 0.9]},
    "loss.temperature": {"float": [0.05, 5], "log": True},
}

OPTIMUM = {"optim.lr": 3e-4, "optim.weight_decay": 0.7, "masking.ratio": 0.6, "loss.temperature": 2}

GOOD = {"optim.lr": 7.5e-4, "optim.weight_decay": 0.6, "masking.ratio": 0.68, "loss.temperature": 1.26}
"""A tenth of the range away from the optimum in each domain; less than 1 % of random points are nearer."""

WRONG = {"optim.lr": 0.05, "optim.weight_decay": 0.1, "masking.ratio": 0.15, "loss.temperature": 0.1}

NUM_TRIALS = 40

SEEDS = range(12)


def with_priors(centers: dict[str, Any], **options: Any) -> dict[str, Any]:
    priors = {name: {"prior": {"center": center, **options}} for name, center in centers.items()}
    return {name: entry | priors.get(name, {}) for name, entry in SPACE.items()}


def get(config: dict[str, Any], name: str) -> Any:
    section, field = name.split(".")
    return config[section][field]


def study_of(folder: Path, centers: dict[str, Any]) -> Study:
    return load_study(
        write(folder, with_priors(centers, confidence="high"), sampler="random", startup_trials=8, start_from=[])
    )


def trials_to_optimum(study: Study, seed: int) -> int:
    """Trials until one is among the best 0.5 % of random points; one more than all if none is."""
    study = replace(study, search=study.search.model_copy(update={"seed": 1000 * seed}))
    encoder, optuna_study = Encoding(study.space), optuna.create_study(direction="maximize")
    optimum = encoder.encode([OPTIMUM])[0]

    def score(points: list[dict[str, Any]]) -> Any:
        return -((encoder.encode(points) - optimum) ** 2).sum(1)

    enough = np.quantile(score(encoder.sample(5000, np.random.default_rng(0), prior_share=0.0)), 0.995)
    for number in range(NUM_TRIALS):
        draft = Draft(study, optuna_study, optuna_study.get_trials(deepcopy=False))
        values = draft.draw()
        [found] = score([values])
        if found >= enough:
            return number + 1
        optuna_study.tell(draft.create_trial(values, {}), found)
    return NUM_TRIALS + 1


def test_a_good_prior_finds_the_optimum_earlier_and_a_wrong_one_costs_little(tmp_path: Path) -> None:
    found = {
        name: [trials_to_optimum(study_of(tmp_path, centers), seed) for seed in SEEDS]
        for name, centers in (("none", {}), ("good", GOOD), ("wrong", WRONG))
    }
    assert median(found["good"]) <= 0.5 * median(found["none"])
    assert fmean(found["wrong"]) <= fmean(found["none"]) + 8  # startup_trials
    assert min(found["good"]) > 1  # the centers alone are not enough


def test_the_share_of_points_from_priors_falls(tmp_path: Path) -> None:
    study = study_of(tmp_path, GOOD)
    studies = [replace(study, search=study.search.model_copy(update={"seed": seed})) for seed in range(400)]

    def share(num_points: int) -> float:
        tried = [study.space.prior_center()] * num_points
        return fmean(draw_from_priors(one, tried) is not None for one in studies)

    shares = [share(num_points) for num_points in (1, 8, 16, 80)]
    assert shares == pytest.approx([0.5, 0.5, 0.125, 0.005], abs=0.08)
    assert draw_from_priors(study_of(tmp_path, {}), []) is None


def test_the_centers_come_first_and_once(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], int]] = [({}, 1), ({"start_from": []}, 0), ({"start_from": [{}, GOOD]}, 1)]
    for number, (search, place) in enumerate(cases):
        study = make_study(tmp_path / str(number), with_priors(GOOD), sampler="random", num_trials=4, **search)
        searcher, _ = make_searcher(study, tmp_path / str(number))
        trained = [{name: get(suggestion["config"], name) for name in SPACE} for suggestion in train_all(searcher)]
        assert [point == GOOD for point in trained] == [index == place for index in range(4)]


@pytest.mark.parametrize("sampler", ["qmc", "nsga2"])
def test_a_search_with_priors_restarted_after_each_trial_proposes_the_same_points(tmp_path: Path, sampler: str) -> None:
    found = []
    for name, limits in (("one", [6]), ("two", [1] * 6)):
        study = make_study(tmp_path / name, with_priors(GOOD), sampler=sampler, num_trials=6, startup_trials=4)
        trained = [train_all(make_searcher(study, tmp_path / name)[0], limit) for limit in limits]
        found.append([suggestion["config"] for suggestion in itertools.chain(*trained)])
    assert found[0] == found[1] and len(found[0]) == 6


def test_a_grid_takes_every_point_and_likely_ones_earlier(tmp_path: Path) -> None:
    ratios = {"masking.ratio": {"float": [0.1, 0.9], "step": 0.1, "prior": {"center": 0.3, "confidence": "high"}}}
    study = make_study(tmp_path, ratios, sampler="grid", num_trials=20, start_from=[])
    trained = [suggestion["config"]["masking"]["ratio"] for suggestion in train_all(make_searcher(study, tmp_path)[0])]
    assert sorted(trained) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    points = list(study.space.grid())
    orders = [order_by_priors(study.space, points, seed) for seed in range(500)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    first = [points[order[0]]["masking.ratio"] for order in orders]
    density = np.exp(Encoding(study.space).prior_log_density(points))
    expected = ((density + 1) / (density + 1).sum()).tolist()
    assert [first.count(point["masking.ratio"]) / 500 for point in points] == pytest.approx(expected, abs=0.06)


def test_a_changed_prior_resumes_the_study(tmp_path: Path) -> None:
    for centers, limit in ((GOOD, 2), (WRONG, 2), ({}, 9)):
        study = make_study(tmp_path, with_priors(centers), num_trials=6)
        trained = train_all(make_searcher(study, tmp_path)[0], limit)
        assert len(trained) == 2
