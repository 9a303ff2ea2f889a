"""What one field of the configuration may be in a search, and under which conditions it is varied at all."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from csmae.config import ConfigError
from csmae.settings import did_you_mean
from csmae.study.values import Scalar, Value, field_types, finite, packed, plain, same, takes_lists, unpacked

KINDS = ("float", "int", "choice")

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Condition:
    """What another field's value must be, such as ``> 0`` or one of ``[secd, sesd]``."""

    name: str
    test: Callable[[Any], bool]
    text: str
    named: tuple[Any, ...]
    """Values that it names: those it wants, or the number it compares with."""
    compares: bool = False
    """Whether the other field must be a number."""

    @classmethod
    def parse(cls, name: str, wanted: Any) -> Condition:
        """Read a list (any of), a comparison such as ``"> 0"``, or a value (equal to).

        A field whose values are lists is compared with one list, or with any of a list of lists.

        Raises:
            ConfigError: A comparison with something that is no number.
        """
        wanted = plain(name, wanted)
        if isinstance(wanted, list) and (not takes_lists(name) or any(isinstance(item, list) for item in wanted)):
            return cls(name, lambda value: value in wanted, f"{name} in {wanted}", tuple(wanted))
        sign = next((s for s in COMPARISONS if isinstance(wanted, str) and wanted.startswith(s)), None)
        if sign is None:
            return cls(name, lambda value: bool(value == wanted), f"{name} == {wanted}", (wanted,))
        try:
            bound = float(wanted.removeprefix(sign))
        except ValueError:
            raise ConfigError(f"condition {name}: {wanted!r} must compare with a number, such as '> 0'") from None
        compare = COMPARISONS[sign]

        def test(value: Any) -> bool:
            return value is not None and compare(float(value), bound)

        return cls(name, test, f"{name} {sign} {_short(bound)}", (bound,), compares=True)


@dataclass(frozen=True)
class Domain:
    """What one field may be."""

    name: str
    distribution: BaseDistribution
    when: tuple[Condition, ...] = ()

    @classmethod
    def parse(cls, name: str, entry: Any) -> Domain:
        """Read an entry such as ``{float: [1e-5, 1e-3], log: true}``.

        Raises:
            ConfigError: The entry is none, or the field cannot take it.
        """
        if not isinstance(entry, dict) or sum(kind in entry for kind in KINDS) != 1:
            raise ConfigError("must be {float: [low, high]}, {int: [low, high]} or {choice: [...]}")
        kind = next(kind for kind in KINDS if kind in entry)
        known = [kind, "when"] + ([] if kind == "choice" else ["log", "step"])
        for key in entry:
            if key not in known:
                raise ConfigError(f"{key!r} is not an option of {kind}{did_you_mean(str(key), known)}")
        when = entry.get("when") or {}
        if not isinstance(when, dict):
            raise ConfigError("when must map fields to what they must be, such as {loss.mim_weight: '> 0'}")
        conditions = tuple(Condition.parse(str(other), wanted) for other, wanted in when.items())
        if kind == "choice":
            choices = _choices(name, entry["choice"])
            return cls(name, CategoricalDistribution([packed(choice) for choice in choices]), conditions)
        distribution = _range(kind, entry)
        if kind == "float" and float not in field_types(name):
            raise ConfigError("takes no fractions: use int: [low, high] or choice: [...]")
        return cls(name, distribution, conditions)

    @property
    def ends(self) -> list[Value]:
        """Both ends of a range, or every choice."""
        if isinstance(self.distribution, CategoricalDistribution):
            return [self.decode(choice) for choice in self.distribution.choices]
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        return [self.decode(self.distribution.low), self.decode(self.distribution.high)]

    @property
    def values(self) -> list[Value]:
        """All values of a domain of finite size."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return self.ends
        assert isinstance(domain, FloatDistribution | IntDistribution) and domain.step is not None
        return [self.decode(domain.low + step * domain.step) for step in range(int(self.size))]

    @property
    def size(self) -> float:
        """Number of values; infinite for a float without step."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return len(domain.choices)
        assert isinstance(domain, FloatDistribution | IntDistribution)
        return math.inf if domain.step is None else round((domain.high - domain.low) / domain.step) + 1

    def __contains__(self, value: Any) -> bool:
        try:
            self.fit(value)
        except ValueError:
            return False
        return True

    def fit(self, value: Any) -> Value:
        """The domain's own value that a given one means: ``"1e-3"`` is 0.001, and a stepped value has the step's digits.

        Raises:
            ValueError: It lies outside.
        """
        value = plain(self.name, value)
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            for choice in self.ends:
                if same(choice, value):
                    return choice
        elif finite(value) is not None and domain._contains(domain.to_internal_repr(value)):
            return self.decode(value)
        raise ValueError(f"{self.name} {value} is outside its domain: {self}")

    def decode(self, stored: Any) -> Value:
        """A value from Optuna's record, where lists stand as text and sums of steps with their rounding errors."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return unpacked(self.name, stored)
        if isinstance(domain, IntDistribution):
            return int(stored)
        assert isinstance(domain, FloatDistribution)
        if domain.step is None:
            return float(stored)
        low, step = Decimal(repr(domain.low)), Decimal(repr(domain.step))
        return min(domain.high, float(low + round((stored - domain.low) / domain.step) * step))

    def suggest(self, trial: optuna.Trial) -> Value:
        """The trial's value, drawn by the study's sampler."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            value: Scalar = trial.suggest_categorical(self.name, domain.choices)
        elif isinstance(domain, IntDistribution):
            value = trial.suggest_int(self.name, domain.low, domain.high, step=domain.step, log=domain.log)
        else:
            assert isinstance(domain, FloatDistribution)
            value = trial.suggest_float(self.name, domain.low, domain.high, step=domain.step, log=domain.log)
        return self.decode(value)

    def __str__(self) -> str:
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            text = f"one of {', '.join(map(json.dumps, self.ends))}"
        else:
            assert isinstance(domain, FloatDistribution | IntDistribution)
            kind = "int" if isinstance(domain, IntDistribution) else "float"
            plain = domain.step is None or (kind == "int" and domain.step == 1)
            step = "" if plain else f", step {_short(domain.step)}"
            text = f"{kind} {_short(domain.low)} to {_short(domain.high)}{', log' if domain.log else ''}{step}"
        return text + (f", when {' and '.join(c.text for c in self.when)}" if self.when else "")


def _choices(name: str, choices: Any) -> list[Value]:
    if not isinstance(choices, list) or not choices:
        raise ConfigError("choice must list at least one value")
    choices = plain(name, choices)
    if not all(_is_scalar(item) for choice in choices for item in (choice if isinstance(choice, list) else [choice])):
        raise ConfigError(f"choice must list numbers, words, true, false or null, or lists of them, found {choices}")
    if any(same(one, other) or same(packed(one), packed(other)) for one, other in combinations(choices, 2)):
        raise ConfigError(f"choice names a value twice: {choices}")
    return list(choices)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _range(kind: str, entry: Mapping[str, Any]) -> FloatDistribution | IntDistribution:
    ends, log, step = entry[kind], entry.get("log", False), entry.get("step")
    if not isinstance(ends, list) or len(ends) != 2:
        raise ConfigError(f"{kind} must be [low, high], found {ends}")
    if not isinstance(log, bool):
        raise ConfigError(f"log must be true or false, found {log!r}")
    low, high = (_number(kind, end) for end in ends)
    if not low < high:
        raise ConfigError(f"low must be smaller than high, found {ends}")
    try:
        if kind == "int":
            return IntDistribution(int(low), int(high), log, 1 if step is None else int(_number(kind, step)))
        return FloatDistribution(low, high, log, None if step is None else _number(kind, step))
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _number(kind: str, value: Any) -> float:
    """A finite number; YAML reads 1e-5 as a word, which is taken for what it means."""
    number = finite(value)
    if number is None or (kind == "int" and number != int(number)):
        raise ConfigError(f"{kind} takes {'whole ' if kind == 'int' else ''}numbers, found {value!r}")
    return number


def _short(value: float | None) -> str:
    """A number with all its digits, and no more."""
    return repr(value).removesuffix(".0")
