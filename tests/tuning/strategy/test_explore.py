"""How the values of a copy differ from its parent's."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csmae.study.encoding import Encoding
from csmae.study.space import Space
from csmae.study.values import Value
from csmae.tuning.strategy.explore import perturb

BASE = {
    "loss.mim_weight": 1.0,
    "loss.temperature": 0.5,
    "masking.ratio": 0.5,
    "optim.lr": 1e-4,
    "masking.strategy": "random",
    "optim.warmup_epochs": 10,
    "optim.betas": [0.9, 0.95],
    "loss.norm_pix": False,
}


def space_of(**domains: Any) -> Space:
    return Space.parse({name.replace("__", "."): domain for name, domain in domains.items()}, BASE)


def values_of(space: Space, point: dict[str, Value], name: str, resampled: bool = False) -> Counter[Any]:
    """Values that one field gets in many copies; without a drawn point, nothing is resampled."""
    random, encoding = np.random.default_rng(0), Encoding(space)
    draws = (encoding.sample(1, random)[0] if resampled else {} for _ in range(400))
    return Counter(perturb(space, point, drawn, random).get(name) for drawn in draws)


def test_a_number_is_multiplied_by_one_of_two_factors() -> None:
    space = space_of(optim__lr={"float": [1e-5, 1.0], "log": True})
    values = values_of(space, {"optim.lr": 0.01}, "optim.lr")
    assert set(values) == {0.8 * 0.01, 1.2 * 0.01}
    assert min(values.values()) > 150


@pytest.mark.parametrize(("value", "expected"), [(0.89, {0.9, 0.8 * 0.89}), (0.26, {0.25, 1.2 * 0.26})])
def test_a_number_stays_in_its_range(value: float, expected: set[float]) -> None:
    space = space_of(masking__ratio={"float": [0.25, 0.9]})
    assert set(values_of(space, {"masking.ratio": value}, "masking.ratio")) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.5, {0.4, 0.6}), (0.9, {0.7, 0.9}), (0.1, {0.05, 0.15}), (0.05, {0.05, 0.1})]
)
def test_a_number_with_a_step_moves_by_at_least_one_step(value: float, expected: set[float]) -> None:
    space = space_of(masking__ratio={"float": [0.05, 0.9], "step": 0.05})
    assert set(values_of(space, {"masking.ratio": value}, "masking.ratio")) == expected


def test_a_choice_becomes_one_of_its_neighbors() -> None:
    space = space_of(masking__strategy={"choice": ["identical", "random", "disjoint"]})
    values = values_of(space, {"masking.strategy": "random"}, "masking.strategy")
    assert set(values) == {"identical", "disjoint"}
    assert set(values_of(space, {"masking.strategy": "identical"}, "masking.strategy")) == {"identical", "random"}


def test_a_quarter_of_the_values_is_drawn_anew() -> None:
    space = space_of(masking__ratio={"float": [0.25, 0.9]})
    values = values_of(space, {"masking.ratio": 0.5}, "masking.ratio", resampled=True)
    assert 70 < 400 - values[0.4] - values[0.6] < 130


def test_a_field_is_varied_only_where_its_condition_holds() -> None:
    space = space_of(
        masking__strategy={"choice": ["random", "disjoint"]},
        masking__ratio={"float": [0.25, 0.9], "when": {"masking.strategy": "random"}},
    )
    random = np.random.default_rng(0)
    seen = Counter[int]()
    for _ in range(200):
        point = perturb(space, {"masking.strategy": "disjoint"}, Encoding(space).sample(1, random)[0], random)
        assert ("masking.ratio" in point) == (point["masking.strategy"] == "random")
        seen[len(point)] += 1
    assert min(seen.values()) > 30 and len(seen) == 2


@given(seed=st.integers(0, 2**32 - 1), log=st.booleans())
@settings(deadline=None)
def test_every_value_is_in_its_domain(seed: int, log: bool) -> None:
    space = space_of(
        optim__lr={"float": [1e-5, 1e-2], "log": log},
        masking__ratio={"float": [0.1, 0.9], "step": 0.1},
        optim__warmup_epochs={"int": [1, 40], "log": log},
        loss__norm_pix={"choice": [True, False]},
        optim__betas={"choice": [[0.9, 0.95], [0.9, 0.999]]},
    )
    random = np.random.default_rng(seed)
    point, drawn = Encoding(space).sample(2, random)
    values = perturb(space, point, drawn, random)
    assert values.keys() == space.domains.keys()
    assert all(space.domains[name].fit(value) == value for name, value in values.items())
