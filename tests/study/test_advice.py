"""Settings of a search that cannot do what one expects of them: refused, or said in one line at the start."""

from pathlib import Path
from typing import Any

import pytest

from csmae.console.dry_run import format_dry_run
from csmae.study.study import load_study
from csmae.trials.store import TrialStore
from csmae.tuning.early_stopping import Median, make_stopping_rule
from csmae.tuning.settings_warnings import settings_warnings
from tests.study.test_study import BASE, refuse, write
from tests.tuning.test_searcher import SPACE

CONDITIONAL = {
    "masking.ratio": {"float": [0.3, 0.9]},
    "loss.mim_weight": {"choice": [0.0, 1.0]},
    "loss.temperature": {"float": [0.1, 1], "when": {"loss.mim_weight": "> 0"}},
}


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({"sampler": "gp"}, "search.sampler gp draws loss.temperature at random"),
        ({"sampler": "qmc"}, "search.sampler qmc draws loss.temperature at random"),
        ({"sampler": "nsga2"}, "search.sampler nsga2 draws loss.temperature at random"),
        ({"sampler": "gp"}, "search.sampler gp learns nothing from trials that are stopped early"),
        ({"sampler": "nsga2", "num_trials": 60}, "search.sampler nsga2 learns from generations of 4 trials"),
        ({"sampler": "nsga2", "num_trials": 12}, "search.sampler nsga2 is random search here"),
        ({"sampler": "tpe", "num_trials": 8}, "search.startup_trials 8: all 8 trials are drawn at random"),
        ({"grace_epochs": 9}, "search.scheduler asha stops no trial"),
        ({"scheduler": "hyperband", "grace_epochs": 3}, "search.scheduler hyperband is asha here"),
    ],
)
def test_what_a_setting_cannot_do_is_said_in_one_line(tmp_path: Path, search: dict[str, Any], text: str) -> None:
    base = {**BASE, "train": {"epochs": 9}}
    study = load_study(write(tmp_path, CONDITIONAL, base=base, **{"num_trials": 40, **search}))
    assert [note for note in settings_warnings(study) if text in note]
    assert f"\nnote: {text}" in format_dry_run(study, None)
    assert all("\n" not in note for note in settings_warnings(study))


@pytest.mark.parametrize(("every", "said"), [(1, False), (3, False), (4, True), (9, True)])
def test_scores_that_come_too_late_to_stop_a_trial_are_said(tmp_path: Path, every: int, said: bool) -> None:
    base = {**BASE, "eval": {"every": every}}
    study = load_study(write(tmp_path, SPACE, base=base, num_trials=40))
    assert any("search.scheduler asha stops no trial" in note for note in settings_warnings(study)) == said


@pytest.mark.parametrize("search", [{}, {"sampler": "random"}, {"sampler": "gp", "scheduler": "none"}])
def test_a_search_that_does_what_one_expects_has_no_notes(tmp_path: Path, search: dict[str, Any]) -> None:
    assert list(settings_warnings(load_study(write(tmp_path, SPACE, num_trials=40, **search)))) == []


@pytest.mark.parametrize(
    ("search", "texts"),
    [
        ({"hang_timeout": "0s"}, ["search.hang_timeout", "longer than 0", "'0s'"]),
        ({"time_limit": "0m"}, ["search.time_limit", "longer than 0"]),
        ({"grace_epochs": 5}, ["search.grace_epochs 5", "train.epochs 4"]),
        ({"grace_epochs": 5, "scheduler": "median"}, ["search.grace_epochs 5", "train.epochs 4"]),
    ],
)
def test_settings_with_which_nothing_can_work_are_refused(
    tmp_path: Path, search: dict[str, Any], texts: list[str]
) -> None:
    refuse(write(tmp_path, SPACE, **search), *texts)


def test_grace_epochs_are_compared_with_the_longest_training_of_the_space(tmp_path: Path) -> None:
    space = {"train.epochs": {"int": [3, 30]}}
    assert load_study(write(tmp_path, space, grace_epochs=20)).longest == 30
    refuse(write(tmp_path, space, grace_epochs=31), "search.grace_epochs 31", "train.epochs 30")


@pytest.mark.parametrize(("epochs", "grace", "judged"), [(9, 3, {3}), (9, 1, {1, 3}), (28, 1, {1, 3, 9}), (3, 3, {3})])
def test_every_bracket_of_hyperband_can_stop_trials(tmp_path: Path, epochs: int, grace: int, judged: set[int]) -> None:
    base = {**BASE, "train": {"epochs": epochs}}
    study = load_study(write(tmp_path, SPACE, base=base, scheduler="hyperband", grace_epochs=grace))
    rule = make_stopping_rule(study.search, TrialStore(study, tmp_path).curves(), study.longest)
    assert rule is not None
    for number in range(6):
        assert all(rule.should_continue(number, epoch, (0.9,)) for epoch in range(1, epochs + 1))
    stopped = [
        next(epoch for epoch in range(1, epochs + 1) if not rule.should_continue(number, epoch, (0.1,)))
        for number in (6, 7, 8)
    ]
    assert set(stopped) == judged


def test_median_stops_no_trial_before_three_others_have_come_as_far() -> None:
    median = Median(1)
    for number in range(3):
        assert median.should_continue(number, 1, (0.9 - 0.1 * number,))
    assert not median.should_continue(3, 1, (0.5,))
