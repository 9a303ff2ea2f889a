"""Settings of the search: invalid ones are rejected with one line."""

from pathlib import Path
from typing import Any

import pytest

from csmae.config import ConfigError, MayChange, changeable
from csmae.study.options import Search
from csmae.study.study import load_study
from tests.study.test_study import assert_rejected, write

SPACE = {"masking.ratio": {"float": [0.3, 0.9]}, "masking.strategy": {"choice": ["random", "disjoint"]}}


@pytest.mark.parametrize(
    ("search", "texts"),
    [
        ({"num_trails": 3}, ["'search.num_trails'", "did you mean 'search.num_trials'?"]),
        ({"num_trials": 0}, ["search.num_trials", "found 0"]),
        ({"sampler": "tpee"}, ["search.sampler", "'tpee'"]),
        ({"constraints": {"cost/parms": "<= 1"}}, ["search.constraints", "no epoch reports 'cost/parms'"]),
        ({"constraints": {"cost/params": "< 1"}}, ["search.constraints", "must be '<= number'"]),
        ({"workers_per_trial": 3}, ["optim.batch_size", "128 on 3 workers"]),
        ({"start_from": [{"optim.lr": 1}]}, ["start_from", "'optim.lr' is not in the space"]),
        ({"start_from": [{"masking.ratio": 0.95}]}, ["start_from", "outside its domain"]),
    ],
)
def test_wrong_settings_of_the_search_are_rejected(tmp_path: Path, search: dict[str, Any], texts: list[str]) -> None:
    assert_rejected(write(tmp_path, SPACE, **search), *texts)


@pytest.mark.parametrize(
    ("search", "texts"),
    [
        ({"hang_timeout": "0s"}, ["search.hang_timeout", "longer than 0", "'0s'"]),
        ({"time_limit": "0m"}, ["search.time_limit", "longer than 0"]),
        ({"grace_epochs": 5}, ["search.grace_epochs 5", "train.epochs 4"]),
        ({"grace_epochs": 5, "strategy": "median"}, ["search.grace_epochs 5", "train.epochs 4"]),
    ],
)
def test_settings_that_cannot_work_are_rejected(tmp_path: Path, search: dict[str, Any], texts: list[str]) -> None:
    assert_rejected(write(tmp_path, SPACE, **search), *texts)


@pytest.mark.parametrize(
    ("search", "assignments", "line"),
    [
        ({"foo": 3}, [], "'search.foo' is not a setting of the search"),
        (
            {"confirm": {"tap": 1}},
            [],
            "'search.confirm.tap' is not a setting of the search; did you mean 'search.confirm.top'?",
        ),
        ({}, ["search=5"], "--set search=5: 'search' is not a field of the configuration"),
        (
            {},
            ["search.num_trial=5"],
            "--set search.num_trial=5: 'search.num_trial' is not a setting of the search; did you mean 'search.num_trials'?",
        ),
    ],
)
def test_only_a_similar_setting_is_suggested(
    tmp_path: Path, search: dict[str, Any], assignments: list[str], line: str
) -> None:
    path = write(tmp_path, SPACE, **search)
    with pytest.raises(ConfigError) as caught:
        load_study(path, assignments=assignments)
    assert str(caught.value) == f"{path}: {line}"


def test_grace_epochs_are_compared_with_the_longest_training_of_the_space(tmp_path: Path) -> None:
    space = {"train.epochs": {"int": [3, 30]}}
    assert load_study(write(tmp_path, space, grace_epochs=20)).max_epochs == 30
    assert_rejected(write(tmp_path, space, grace_epochs=31), "search.grace_epochs 31", "train.epochs 30")


def test_all_settings_but_objectives_and_constraints_may_change_in_a_study() -> None:
    free = {name.partition(".")[0] for name in changeable(MayChange.ON_STUDY_RESUME, Search)}
    fixed = Search.model_fields.keys() - free
    assert fixed == {"objectives", "constraints"} == Search().definition().keys()
