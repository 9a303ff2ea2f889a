"""Warnings about samplers that draw at random and schedulers that stop nothing."""

from pathlib import Path
from typing import Any

import pytest

from csmae.console.dry_run import format_dry_run
from csmae.study.study import load_study
from csmae.tuning.settings_warnings import settings_warnings
from tests.study.test_study import BASE, write
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
        ({"grace_epochs": 9}, "search.strategy asha stops no trial"),
        ({"strategy": "hyperband", "grace_epochs": 4}, "search.strategy hyperband stops no trial"),
        ({"strategy": "hyperband", "num_trials": 16}, "search.strategy hyperband needs 17 trials"),
    ],
)
def test_a_setting_without_its_usual_effect_is_warned_about_in_one_line(
    tmp_path: Path, search: dict[str, Any], text: str
) -> None:
    base = {**BASE, "train": {"epochs": 9}}
    study = load_study(write(tmp_path, CONDITIONAL, base=base, **{"num_trials": 40, **search}))
    assert [warning for warning in settings_warnings(study) if text in warning]
    assert f"\nnote: {text}" in format_dry_run(study, None)
    assert all("\n" not in warning for warning in settings_warnings(study))


@pytest.mark.parametrize(("every", "warned"), [(1, False), (3, False), (4, True), (9, True)])
def test_scores_that_come_too_late_to_stop_a_trial_are_warned_about(tmp_path: Path, every: int, warned: bool) -> None:
    base = {**BASE, "eval": {"every": every}}
    study = load_study(write(tmp_path, SPACE, base=base, num_trials=40))
    assert any("search.strategy asha stops no trial" in warning for warning in settings_warnings(study)) == warned


@pytest.mark.parametrize("search", [{}, {"sampler": "random"}, {"sampler": "gp", "strategy": "none"}])
def test_ordinary_settings_give_no_warnings(tmp_path: Path, search: dict[str, Any]) -> None:
    assert list(settings_warnings(load_study(write(tmp_path, SPACE, num_trials=40, **search)))) == []
