"""Study files: sections, conditions, starting points, and checks before anything starts."""

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import optuna
import pytest
import yaml
from hypothesis import given, settings

from csmae.config import ConfigError
from csmae.study.condition import Comparison, holds
from csmae.study.space import Space
from csmae.study.study import Study, load_study

SPACES = sorted((Path(__file__).parents[2] / "spaces").glob("*.yaml"))

BASE = {"model": {"size": "nano"}, "optim": {"warmup_epochs": 0}, "train": {"epochs": 4}}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def write(folder: Path, space: dict[str, Any], base: dict[str, Any] | None = None, **search: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump({"base": BASE if base is None else base, "space": space, "search": search}, sort_keys=False)
    )
    return path


def assert_rejected(path: Path, *texts: str, assignments: list[str] | None = None) -> None:
    """Loading fails with lines that begin with the path, and one of them has all the texts."""
    with pytest.raises(ConfigError) as caught:
        load_study(path, assignments=assignments)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert any(all(text in line for text in texts) for line in lines), lines


def draw(study: Study, count: int) -> list[dict[str, Any]]:
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.space.suggest(random.ask()) for _ in range(count)]


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_file_in_spaces_loads_and_both_ends_of_every_domain_validate(path: Path) -> None:
    study = load_study(path)
    for name, domain in study.space.domains.items():
        for end in domain.ends:
            point = study.space.point_with(name, end)
            assert point[name] == end
            study.resolve(point)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_file_in_spaces_proposes_valid_configurations(path: Path) -> None:
    study = load_study(path)
    for values in draw(study, 60):
        study.resolve(values)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_file_in_spaces_starts_from_its_own_base(path: Path) -> None:
    study = load_study(path)
    assert [study.resolve(point) for point in study.starting_points()] == [study.resolve({})]


def test_values_of_the_space_replace_those_of_the_base(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, {"masking.ratio": {"float": [0.3, 0.9]}}))
    assert study.resolve({"masking.ratio": 0.7}).masking.ratio == 0.7
    assert study.resolve({}).masking.ratio == 0.5
    assert study.resolve({"masking.ratio": 0.7}).train.epochs == 4


def test_the_base_may_be_written_with_dotted_names(tmp_path: Path) -> None:
    path = write(tmp_path, {"masking.ratio": {"float": [0.3, 0.9]}}, base={"optim.lr": 0.5, "model": {"size": "tiny"}})
    config = load_study(path).resolve({})
    assert (config.optim.lr, config.model.embed_dim) == (0.5, 192)


def test_an_inactive_parameter_is_not_proposed(tmp_path: Path) -> None:
    space = {
        "model.sensor_depth": {"int": [1, 3], "when": {"model.variant": ["secd", "sesd"]}},
        "model.variant": {"choice": ["cecd", "cesd", "secd", "sesd"]},
    }
    drawn = draw(load_study(write(tmp_path, space)), 50)
    for values in drawn:
        assert ("model.sensor_depth" in values) == values["model.variant"].startswith("se")
    assert len({"model.sensor_depth" in values for values in drawn}) == 2


def test_a_condition_on_a_field_outside_the_space_reads_the_base(tmp_path: Path) -> None:
    space = {
        "masking.ratio": {"float": [0.3, 0.9]},
        "loss.temperature": {"float": [0.1, 1], "when": {"loss.mim_weight": "> 0"}},
    }
    active = load_study(write(tmp_path, space))
    assert all("loss.temperature" in values for values in draw(active, 5))
    off = {**BASE, "loss": {"mim_weight": 0}}
    assert_rejected(write(tmp_path, space, base=off), "loss.temperature", "loss.mim_weight > 0", "never holds")


@pytest.mark.parametrize(
    "space",
    [
        {"model.sensor_depth": {"int": [1, 5]}, "optim.lr": {"float": [0.1, 1], "when": {"model.sensor_depth": 3}}},
        {
            "model.sensor_depth": {"int": [1, 50]},
            "optim.lr": {"float": [0.1, 1], "when": {"model.sensor_depth": ">= 17"}},
        },
        {
            "loss.mim_weight": {"float": [0, 4]},
            "optim.lr": {"float": [0.1, 1], "when": {"loss.mim_weight": "> 1"}},
            "loss.temperature": {"float": [0.1, 1], "when": {"loss.mim_weight": "< 3", "optim.lr": "> 0.5"}},
        },
        {
            "model.variant": {"choice": ["sesd", "secd", "cecd", "cesd"]},
            "model.sensor_depth": {"int": [1, 3], "when": {"model.variant": ["secd", "sesd"]}},
            "optim.lr": {"float": [0.1, 1], "when": {"model.sensor_depth": "> 1", "model.variant": "secd"}},
        },
    ],
)
def test_conditions_that_hold_somewhere_between_the_ends_are_found(tmp_path: Path, space: dict[str, Any]) -> None:
    study = load_study(write(tmp_path, space))
    assert study.space.point_with("optim.lr", 0.3)["optim.lr"] == 0.3
    for name, domain in study.space.domains.items():
        assert all(name in study.space.point_with(name, end) for end in domain.ends)


@given(st.floats(-5, 5), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_comparisons_in_conditions_compare_as_written(bound: float, value: float) -> None:
    expected = {">": value > bound, "<": value < bound, ">=": value >= bound, "<=": value <= bound}
    for sign, satisfied in expected.items():
        assert holds(Comparison(f"{sign} {bound!r}"), value) == satisfied


def test_set_fixes_a_field_and_takes_it_out_of_the_space(tmp_path: Path) -> None:
    path = write(tmp_path, {"masking.ratio": {"float": [0.3, 0.9]}, "optim.lr": {"float": [1e-4, 1e-2], "log": True}})
    study = load_study(path, assignments=["masking.ratio=0.4", "search.num_trials=3"])
    assert list(study.space.domains) == ["optim.lr"]
    assert study.resolve({}).masking.ratio == 0.4
    assert study.search.num_trials == 3


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("space:\n  optim.lr: {float: [1e-5, 1e-3], log: true}\n  optim.weight_decay: {choice: [1e-2, 0.1]}")
    domains = load_study(path).space.domains
    assert domains["optim.lr"].ends == [1e-5, 1e-3]
    assert domains["optim.weight_decay"].ends == [0.01, 0.1]


def test_starting_points_come_first_and_are_completed_from_the_base(tmp_path: Path) -> None:
    space = {"masking.ratio": {"float": [0.3, 0.9]}, "optim.lr": {"float": [1e-5, 1e-2]}}
    study = load_study(write(tmp_path, space, start_from=[{"masking.ratio": 0.8}, {}]))
    assert list(study.starting_points()) == [
        {"masking.ratio": 0.8, "optim.lr": 1e-4},
        {"masking.ratio": 0.5, "optim.lr": 1e-4},
    ]


@pytest.mark.parametrize(
    ("space", "texts"),
    [
        ({"masking.rato": {"float": [0.1, 0.9]}}, ["space key 'masking.rato'", "did you mean 'masking.ratio'?"]),
        ({"masking.ratio": {"flaot": [0.1, 0.9]}}, ["masking.ratio", "{float: [low, high]}"]),
        ({"masking.ratio": {"float": [0.9, 0.1]}}, ["masking.ratio", "low must be smaller than high"]),
        ({"masking.ratio": {"float": [0.1]}}, ["masking.ratio", "[low, high]"]),
        ({"masking.ratio": {"float": [0.1, "x"]}}, ["masking.ratio", "takes numbers", "'x'"]),
        ({"masking.ratio": {"float": [0, 0.9], "log": True}}, ["masking.ratio", "low"]),
        ({"masking.ratio": {"float": [0.1, 0.9], "lgo": True}}, ["'lgo'", "did you mean 'log'?"]),
        ({"masking.ratio": {"float": [0.1, 1.0]}}, ["space key 'masking.ratio' at 1.0", "less than 1"]),
        ({"masking.strategy": {"choice": ["random", "rnd"]}}, ["space key 'masking.strategy' at rnd"]),
        ({"masking.strategy": {"choice": ["random", "random"]}}, ["names a value twice"]),
        ({"masking.strategy": {"choice": []}}, ["at least one value"]),
        ({"model.decoder_depth": {"float": [1, 4]}}, ["model.decoder_depth", "takes no fractions"]),
        ({"model.patch_size": {"int": [10, 13]}}, ["space key 'model.patch_size' at 13", "must divide"]),
        ({"model.variant": {"choice": ["sesd", "cecd"]}, "model.sensor_depth": {"int": [1, 2]}}, ["must be 0"]),
        ({"eval.k": {"int": [5, 10]}}, ["eval.k", "do not compare"]),
        ({"train.changes": {"choice": [[], [1]]}}, ["train.changes", "holds values of several fields"]),
        ({}, ["the space is empty"]),
        ({"optim.lr": {"float": [0.1, 1], "when": {"loss.x": 1}}}, ["unknown field 'loss.x'"]),
        ({"optim.lr": {"float": [0.1, 1], "when": {"loss.mim_weight": "> much"}}}, ["must compare with a number"]),
        ({"optim.lr": {"float": [0.1, 1], "when": {"model.variant": "> 0"}}}, ["model.variant is not a number"]),
        ({"optim.lr": {"float": [0.1, 1], "when": {"optim.betas": "> 0"}}}, ["optim.betas is not a number"]),
        (
            {
                "optim.lr": {"float": [0.1, 1], "when": {"loss.mim_weight": "> 0"}},
                "loss.mim_weight": {"float": [0, 1], "when": {"optim.lr": "> 0.5"}},
            },
            ["are circular", "optim.lr -> loss.mim_weight -> optim.lr"],
        ),
        (
            {
                "loss.mim_weight": {"choice": [0.0, 1.0]},
                "loss.temperature": {"float": [0.1, 1], "when": {"loss.mim_weight": "> 0"}},
                "optim.lr": {"float": [0.1, 1], "when": {"loss.mim_weight": 0, "loss.temperature": "> 5"}},
            },
            ["optim.lr", "never holds"],
        ),
    ],
)
def test_a_wrong_space_is_rejected_with_one_line(tmp_path: Path, space: dict[str, Any], texts: list[str]) -> None:
    assert_rejected(write(tmp_path, space), *texts)


def test_wrong_files_and_options_are_rejected(tmp_path: Path) -> None:
    assert_rejected(tmp_path / "absent.yaml", "cannot be read")
    space = {"masking.ratio": {"float": [0.3, 0.9]}}
    assert_rejected(
        write(tmp_path, space, base={"masking": {"rato": 1}}), "'masking.rato'", "did you mean 'masking.ratio'?"
    )
    assert_rejected(write(tmp_path, space), "search.num_trials", assignments=["search.num_trials=none"])
    assert_rejected(write(tmp_path, space), "did you mean 'masking.ratio'?", assignments=["masking.rato=1"])
    path = tmp_path / "study.yaml"
    path.write_text("spaces: {}")
    assert_rejected(path, "'spaces' is not a section of a study", "did you mean 'space'?")


def test_a_space_counts_its_points(tmp_path: Path) -> None:
    entries = {
        "masking.ratio": {"float": [0.3, 0.9], "step": 0.1},
        "masking.strategy": {"choice": ["random", "disjoint"]},
        "model.decoder_depth": {"int": [1, 4]},
    }
    study = load_study(write(tmp_path, entries))
    assert study.space.size == 7 * 2 * 4
    assert Space(study.space.domains | {}, {}).size == 56
