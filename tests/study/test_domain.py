"""Domains: numbers as YAML writes them, steps, and lists."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from csmae.config import ConfigError
from csmae.console.dry_run import format_dry_run
from csmae.study.domain import parse_domain
from csmae.study.study import load_study
from tests.study.test_study import assert_rejected, draw, write

YAML_NUMBERS = """
base: {model: {size: nano}, optim: {warmup_epochs: 0, batch_size: 1.6e1}, train: {epochs: 4}, data: {max_train_pairs: 1e2}}
space:
  optim.lr: {float: [1e-5, 1e-2], log: true}
  optim.weight_decay: {choice: [1e-3, 1, 0.1]}
  loss.temperature: {float: [0.1, 1], when: {optim.weight_decay: 1e-3}}
  loss.mim_weight: {float: [0, 4], when: {optim.weight_decay: [1e-1, 1e0]}}
search:
  num_trials: 1e2
  start_from: [{optim.lr: 1e-3, optim.weight_decay: 1.0}, {optim.weight_decay: 1e-3}]
"""


def test_a_number_that_yaml_reads_as_text_is_a_number_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(YAML_NUMBERS)
    study = load_study(path, assignments=["search.keep=1e1"])
    assert list(study.starting_points()) == [
        {"optim.lr": 1e-3, "optim.weight_decay": 1, "loss.mim_weight": 1.0},
        {"optim.lr": 1e-4, "optim.weight_decay": 1e-3, "loss.temperature": 0.5},
    ]
    assert (study.search.num_trials, study.search.keep) == (100, 10)
    config = study.resolve({})
    assert (config.data.max_train_pairs, config.optim.batch_size) == (100, 16)


def test_stepped_values_have_the_digits_of_the_step(tmp_path: Path) -> None:
    space = {
        "masking.ratio": {"float": [0.25, 0.65], "step": 0.05},
        "loss.temperature": {"float": [0.1, 1], "when": {"masking.ratio": 0.6}},
        "loss.mim_weight": {"float": [0, 4], "when": {"masking.ratio": "<= 0.6"}},
    }
    study = load_study(write(tmp_path, space, start_from=[{"masking.ratio": 0.6}]))
    assert study.space.domains["masking.ratio"].values == [0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65]
    drawn = [point for point in draw(study, 80) if abs(point["masking.ratio"] - 0.6) < 1e-3]
    assert drawn and all(point["masking.ratio"] == 0.6 and len(point) == 3 for point in drawn)
    assert study.space.point({"masking.ratio": 0.6000000000000001})["masking.ratio"] == 0.6


@given(st.integers(-300, 300), st.sampled_from([0.1, 0.05, 0.3, 1e-5, 0.125, 3.0]), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_a_stepped_value_has_no_rounding_error(start: int, step: float, count: int) -> None:
    low = float(Decimal(repr(step)) * start)
    high = float(Decimal(repr(step)) * (start + count))
    domain = parse_domain("loss.mim_weight", {"float": [low, high], "step": step})
    assert domain.values == [float(Decimal(repr(step)) * (start + k)) for k in range(count + 1)]


BETAS = {"optim.betas": {"choice": [[0.9, 0.95], [0.9, 0.999], [9e-1, "9.9e-1"]]}}


def test_choices_may_be_lists(tmp_path: Path) -> None:
    space = {
        **BETAS,
        "optim.lr": {"float": [0.1, 1], "when": {"optim.betas": [0.9, 0.999]}},
        "loss.mim_weight": {"float": [0, 1], "when": {"optim.betas": [[0.9, 0.95], [0.9, 0.99]]}},
    }
    study = load_study(write(tmp_path, space, start_from=[{}, {"optim.betas": [0.9, "999e-3"]}]))
    assert list(study.starting_points()) == [
        {"optim.betas": [0.9, 0.95], "loss.mim_weight": 1.0},
        {"optim.betas": [0.9, 0.999], "optim.lr": 0.1},
    ]
    drawn = draw(study, 30)
    assert {str(point["optim.betas"]) for point in drawn} == {"[0.9, 0.95]", "[0.9, 0.999]", "[0.9, 0.99]"}
    assert all(("optim.lr" in point) == (point["optim.betas"] == [0.9, 0.999]) for point in drawn)
    assert study.resolve(drawn[0]).optim.betas == tuple(drawn[0]["optim.betas"])
    assert str(study.space.domains["optim.betas"]) == "one of [0.9, 0.95], [0.9, 0.999], [0.9, 0.99]"
    assert "  optim.betas=[0.9, 0.95] loss.mim_weight=1" in format_dry_run(study, None)


@pytest.mark.parametrize(
    ("entry", "texts"),
    [
        ({"choice": [[0.9, 0.95], [0.9, 0.95]]}, ["names a value twice"]),
        ({"choice": [[0.9, 0.95], "[0.9, 0.95]"]}, ["names a value twice"]),
        ({"choice": [[0.9, 0.95], [0.9, 1.5]]}, ["optim.betas' at [0.9, 1.5]", "must lie in [0, 1)"]),
        ({"choice": [{"a": 1}]}, ["choice", "must list numbers"]),
    ],
)
def test_wrong_lists_are_rejected(tmp_path: Path, entry: dict[str, Any], texts: list[str]) -> None:
    assert_rejected(write(tmp_path, {"optim.betas": entry}), *texts)


def test_a_step_of_null_is_one() -> None:
    domain = parse_domain("model.decoder_depth", {"int": [1, 4], "step": None})
    assert domain.values == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match="step > 0"):
        parse_domain("model.decoder_depth", {"int": [1, 4], "step": 0})


@pytest.mark.parametrize("when", [None, {}, [], False, ""])
def test_an_empty_condition_is_none(when: Any) -> None:
    assert str(parse_domain("optim.lr", {"float": [0.1, 1], "when": when})) == "float 0.1 to 1"


def test_a_condition_reads_as_it_is_written(tmp_path: Path) -> None:
    lists: dict[str, Any] = {"one": [0.9, 0.95], "several": [[0.9, 0.95]]}
    one, several = (parse_domain("optim.lr", {"float": [0.1, 1], "when": {"optim.betas": x}}) for x in lists.values())
    assert (one.conditions, several.conditions) == ("optim.betas == [0.9, 0.95]", "optim.betas in [[0.9, 0.95]]")
    space = {
        "loss.mim_weight": {"float": [0, 4]},
        "optim.lr": {"float": [0.1, 1], "when": {"loss.mim_weight": "< inf"}},
    }
    study = load_study(write(tmp_path, space))
    assert study.space.domains["optim.lr"].conditions == "loss.mim_weight < inf"
    assert all("optim.lr" in point for point in draw(study, 5))


@pytest.mark.parametrize(
    ("name", "entry", "line"),
    [
        (
            "optim.lr",
            {"float": {"low": 1, "high": 2}},
            "float must be [low, high], found {'low': 1, 'high': 2}",
        ),
        ("optim.lr", {"float": [1, 2], "step": {"a": 1}}, "step takes numbers, found {'a': 1}"),
        ("optim.lr", {"choice": {"a": 1}}, "choice must list at least one value, found {'a': 1}"),
        ("optim.lr", {"float": [2, 1]}, "low must be smaller than high, found [2, 1]"),
        ("optim.lr", {"float": [1, 2], "log": "yes"}, "log must be true or false, found 'yes'"),
        ("model.decoder_depth", {"int": [1.5, 4]}, "int.0 takes whole numbers, found 1.5"),
        ("model.decoder_depth", {"int": [1, 4], "step": 0.5}, "step takes whole numbers, found 0.5"),
        (
            "optim.lr",
            {"float": [1, 2], "when": {"loss.mim_weight": "> nan"}},
            "when.loss.mim_weight must compare with a number, such as '> 0', found '> nan'",
        ),
    ],
)
def test_an_error_names_the_option_and_what_was_found(
    tmp_path: Path, name: str, entry: dict[str, Any], line: str
) -> None:
    path = write(tmp_path, {name: entry})
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert str(caught.value) == f"{path}: space key {name!r}: {line}"
