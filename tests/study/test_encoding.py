"""Points as vectors: every point comes back, draws respect the space, and both are fast enough for every decision."""

import math
import time
from decimal import Decimal
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from csmae.config import Config
from csmae.settings import flatten
from csmae.study.encoding import Encoding
from csmae.study.space import Space

BASE = dict(flatten(Config().model_dump(mode="json")))

ENTRIES: dict[str, dict[str, Any]] = {
    "model.variant": {"choice": ["secd", "sesd", "cecd", "cesd"]},
    "optim.betas": {"choice": [[0.9, 0.95], [0.9, 0.999], [0.9, 0.99]]},
    "optim.micro_batch_size": {"choice": [None, 1, 5]},
    "model.patch_size": {"choice": [24, 8, 12]},
    "loss.mim_weight": {"float": [0, 4], "step": 0.5},
    "optim.lr": {"float": [1e-5, 1e-2], "log": True},
    "optim.weight_decay": {"float": [0, 0.3]},
    "masking.ratio": {"float": [0.25, 0.9], "step": 0.05},
    "model.decoder_depth": {"int": [2, 8], "step": 2},
    "model.decoder_embed_dim": {"int": [32, 512], "log": True},
    "loss.temperature": {"float": [0.05, 1.0], "log": True, "when": {"loss.mim_weight": "> 0"}},
    "model.sensor_depth": {"int": [1, 4], "when": {"model.variant": ["secd", "sesd"], "optim.micro_batch_size": 1}},
}


def encoding(entries: dict[str, Any] = ENTRIES) -> Encoding:
    return Encoding(Space.parse(entries, BASE))


def draw(count: int, seed: int = 0, entries: dict[str, Any] = ENTRIES) -> list[dict[str, Any]]:
    return encoding(entries).sample(count, np.random.default_rng(seed))


def is_close(point: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two points are equal, but for the rounding of floats."""
    return point.keys() == other.keys() and all(
        math.isclose(value, other[name], rel_tol=1e-9, abs_tol=1e-12)
        if isinstance(value, float)
        else (type(value), value) == (type(other[name]), other[name])
        for name, value in point.items()
    )


def test_the_columns_of_each_kind_of_domain() -> None:
    def columns(name: str, entry: dict[str, Any], *values: Any) -> list[list[float]]:
        points = [{name: value} for value in values]
        rounded: list[list[float]] = np.round(encoding({name: entry}).encode(points), 6).tolist()
        return rounded

    assert columns("optim.lr", {"float": [1e-4, 1e-2], "log": True}, 1e-4, 1e-3, 1e-2) == [[0], [0.5], [1]]
    assert columns("masking.ratio", {"float": [0.2, 0.8]}, 0.2, 0.35, 0.8) == [[0], [0.25], [1]]
    assert columns("masking.ratio", {"float": [0.2, 0.8], "step": 0.2}, 0.2, 0.8) == [[0.125], [0.875]]
    assert columns("model.decoder_depth", {"int": [1, 5]}, 1, 3, 5) == [[0.1], [0.5], [0.9]]
    assert columns("model.patch_size", {"choice": [24, 8, 12]}, 8, 12, 24) == [[0], [0.5], [1]]
    assert columns("train.compile", {"choice": [True, False]}, True, False) == [[0], [1]]
    assert columns("optim.micro_batch_size", {"choice": [None, 1]}, None, 1) == [[0], [1]]
    assert columns("optim.micro_batch_size", {"choice": [None, 1, 5]}, 5, None) == [[0, 0, 1], [1, 0, 0]]
    assert columns("optim.betas", {"choice": [[0.9, 0.95], [0.9, 0.99]]}, [0.9, 0.99], (0.9, 0.95)) == [[1], [0]]
    assert columns("masking.ratio", {"float": [0.2, 0.8]}) == []


def test_an_inactive_domain_is_in_the_middle_and_marked() -> None:
    entries = {name: ENTRIES[name] for name in ("loss.mim_weight", "loss.temperature")}
    points = [{"loss.mim_weight": 0.0}, {"loss.mim_weight": 4.0, "loss.temperature": 1.0}]
    assert encoding(entries).encode(points)[:, 1:].tolist() == [[0.5, 0], [1, 1]]


def test_values_outside_the_space() -> None:
    entries = {"optim.lr": {"float": [1e-4, 1e-2], "log": True}, "model.variant": ENTRIES["model.variant"]}
    point: dict[str, Any] = {"optim.lr": 1e-6, "model.variant": "secd", "train.seed": 3}
    assert encoding(entries).encode([point]).tolist() == [[0, 1, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"model.variant none is outside its domain: one of"):
        encoding(entries).encode([{**point, "model.variant": "none"}])
    with pytest.raises(ValueError, match=r"optim.lr None is outside its domain: float"):
        encoding(entries).encode([{**point, "optim.lr": None}])


@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(sorted(ENTRIES)), min_size=1, unique=True))
@settings(max_examples=60, deadline=None)
def test_draws_belong_to_the_space_and_come_back(seed: int, names: list[str]) -> None:
    entries = {name: ENTRIES[name] for name in names}
    space = Space.parse(entries, BASE)
    points = draw(20, seed, entries)
    vectors = Encoding(space).encode(points)
    assert vectors.min() >= 0 and vectors.max() <= 1
    for point, decoded in zip(points, Encoding(space).decode(vectors), strict=True):
        assert is_close(point, decoded)
        assert all(value in space.domains[name] for name, value in point.items())
        assert all((name in point) == space.is_active(domain, point) for name, domain in space.domains.items())


@given(
    st.integers(-300, 300), st.sampled_from([0.1, 0.05, 0.3, 1e-5, 0.125, 3.0]), st.integers(1, 400), st.floats(0, 1)
)
@settings(max_examples=100, deadline=None)
def test_a_stepped_range_decodes_to_the_nearest_value(start: int, step: float, count: int, vector: float) -> None:
    low, high = (float(Decimal(repr(step)) * steps) for steps in (start, start + count))
    entries = {"loss.mim_weight": {"float": [low, high], "step": step}}
    [point] = encoding(entries).decode(np.array([[vector]]))
    [[middle]] = encoding(entries).encode([point])
    values = Space.parse(entries, BASE).domains["loss.mim_weight"].values
    assert point["loss.mim_weight"] in values
    assert abs(middle - vector) <= 0.5 / len(values) + 1e-9


@given(st.integers(1, 200), st.integers(1, 400), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_integer_of_a_range_comes_back(low: int, count: int, log: bool) -> None:
    entries = {"model.decoder_embed_dim": {"int": [low, low + count], "log": log}}
    points = [{"model.decoder_embed_dim": low + k} for k in range(count + 1)]
    vectors = encoding(entries).encode(points)
    assert (np.diff(vectors[:, 0]) > 0).all()
    assert encoding(entries).decode(vectors) == points
    ends = encoding(entries).decode(np.array([[0.0], [1.0]]))
    assert ends == [points[0], points[-1]]


def test_draws_are_uniform_and_depend_on_the_seed_alone() -> None:
    points = draw(4000)
    assert points == draw(4000) != draw(4000, seed=1)
    assert (
        sorted({point["masking.ratio"] for point in points})
        == Space.parse(ENTRIES, BASE).domains["masking.ratio"].values
    )
    for name, value in (("model.variant", "cecd"), ("masking.ratio", 0.25), ("model.decoder_depth", 8)):
        expected = 1 / Space.parse(ENTRIES, BASE).domains[name].size
        assert sum(point[name] == value for point in points) / 4000 == pytest.approx(expected, abs=0.03)
    assert sum(point["optim.lr"] < 1e-4 for point in points) / 4000 == pytest.approx(1 / 3, abs=0.03)
    assert sum(point["model.decoder_embed_dim"] < 128 for point in points) / 4000 == pytest.approx(1 / 2, abs=0.03)


def test_a_condition_on_an_inactive_domain_reads_the_base() -> None:
    entries = {
        "optim.micro_batch_size": {"choice": [None, 1]},
        "loss.mim_weight": {"float": [2, 4], "when": {"optim.micro_batch_size": 1}},
        "loss.temperature": {"float": [0.1, 1], "when": {"loss.mim_weight": BASE["loss.mim_weight"]}},
        "optim.lr": {"float": [0.1, 1], "when": {"train.seed": BASE["train.seed"] + 1}},
    }
    points = draw(50, entries=entries)
    assert {tuple(point) for point in points} == {
        ("optim.micro_batch_size", "loss.mim_weight"),
        ("optim.micro_batch_size", "loss.temperature"),
    }


def test_without_priors_all_points_are_equally_likely() -> None:
    assert encoding().prior_log_density(draw(5)).tolist() == [0, 0, 0, 0, 0]


def test_2000_points_are_drawn_and_encoded_in_the_time_of_a_decision() -> None:
    encoder, random = encoding(), np.random.default_rng(0)

    def seconds() -> float:
        start = time.process_time()
        assert encoder.encode(encoder.sample(2000, random)).shape == (2000, 21)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.2
