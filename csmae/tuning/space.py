"""A search space: domains of configuration fields, and the conditions under which each is explored."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel

from csmae.config import Config, ConfigError
from csmae.settings import did_you_mean, field_names

Scalar = str | bool | int | float | None

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

    @classmethod
    def parse(cls, name: str, wanted: Any) -> Condition:
        """Read a list (any of), a comparison such as ``"> 0"``, or a value (equal to).

        Raises:
            ConfigError: A comparison with something that is no number.
        """
        if isinstance(wanted, list):
            return cls(name, lambda value: value in wanted, f"{name} in {wanted}")
        sign = next((s for s in COMPARISONS if isinstance(wanted, str) and wanted.startswith(s)), None)
        if sign is None:
            return cls(name, lambda value: bool(value == wanted), f"{name} == {wanted}")
        try:
            bound = float(wanted.removeprefix(sign))
        except ValueError:
            raise ConfigError(f"condition {name}: {wanted!r} must compare with a number, such as '> 0'") from None
        compare = COMPARISONS[sign]
        return cls(name, lambda value: value is not None and compare(float(value), bound), f"{name} {sign} {bound:g}")


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
                raise ConfigError(f"{key!r} is no option of {kind}{did_you_mean(str(key), known)}")
        when = entry.get("when") or {}
        if not isinstance(when, dict):
            raise ConfigError("when must map fields to what they must be, such as {loss.mim_weight: '> 0'}")
        conditions = tuple(Condition.parse(str(other), wanted) for other, wanted in when.items())
        distribution = _choice(entry["choice"], float in _types(name)) if kind == "choice" else _range(kind, entry)
        if kind == "float" and float not in _types(name):
            raise ConfigError("takes no fractions: use int: [low, high] or choice: [...]")
        return cls(name, distribution, conditions)

    @property
    def ends(self) -> list[Scalar]:
        """Both ends of a range, or every choice."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        assert isinstance(self.distribution, FloatDistribution | IntDistribution)
        return [self.distribution.low, self.distribution.high]

    @property
    def size(self) -> float:
        """Number of values; infinite for a float without step."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return len(domain.choices)
        assert isinstance(domain, FloatDistribution | IntDistribution)
        return math.inf if domain.step is None else round((domain.high - domain.low) / domain.step) + 1

    def __contains__(self, value: Any) -> bool:
        if isinstance(self.distribution, CategoricalDistribution):
            return any(type(value) is type(choice) and value == choice for choice in self.distribution.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return bool(self.distribution._contains(self.distribution.to_internal_repr(value)))

    def suggest(self, trial: optuna.Trial) -> Scalar:
        """The trial's value, drawn by the study's sampler."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            value: Scalar = trial.suggest_categorical(self.name, domain.choices)
        elif isinstance(domain, IntDistribution):
            value = trial.suggest_int(self.name, domain.low, domain.high, step=domain.step, log=domain.log)
        else:
            assert isinstance(domain, FloatDistribution)
            value = trial.suggest_float(self.name, domain.low, domain.high, step=domain.step, log=domain.log)
        return value

    def __str__(self) -> str:
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            text = ", ".join("null" if c is None else str(c) for c in domain.choices)
        else:
            assert isinstance(domain, FloatDistribution | IntDistribution)
            step = f", step {domain.step:g}" if domain.step not in (None, 1) else ""
            text = f"{domain.low:g} to {domain.high:g}{', log' if domain.log else ''}{step}"
        return text + (f"  when {' and '.join(c.text for c in self.when)}" if self.when else "")


def _choice(choices: Any, numbers: bool) -> CategoricalDistribution:
    if not isinstance(choices, list) or not choices:
        raise ConfigError("choice must list at least one value")
    if numbers:
        choices = [_number("choice", choice) if isinstance(choice, str) else choice for choice in choices]
    if not all(choice is None or isinstance(choice, str | bool | int | float) for choice in choices):
        raise ConfigError(f"choice must list numbers, words, true, false or null, found {choices}")
    if len({(type(c), c) for c in choices}) < len(choices):
        raise ConfigError(f"choice names a value twice: {choices}")
    return CategoricalDistribution(choices)


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
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or (kind == "int" and number != int(number)):
        raise ConfigError(f"{kind} takes {'whole ' if kind == 'int' else ''}numbers, found {value!r}")
    return number


def _types(name: str) -> tuple[Any, ...]:
    """The types that a field of the configuration takes."""
    model: type[BaseModel] = Config
    *sections, last = name.split(".")
    for section in sections:
        model = model.model_fields[section].annotation  # type: ignore[assignment]
    annotation = model.model_fields[last].annotation
    return (annotation, *get_args(annotation))


@dataclass(frozen=True)
class Space:
    """Domains in an order in which every condition looks back.

    Args:
        domains: By name.
        base: The base configuration's values by dotted name; conditions on fields outside the space read them.
    """

    domains: dict[str, Domain]
    base: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, entries: Mapping[str, Any], base: Mapping[str, Any]) -> Space:
        """Read the section ``space`` of a study.

        Raises:
            ConfigError: An unknown field, an entry that is none, a condition on an unknown field, or a cycle.
        """
        domains: dict[str, Domain] = {}
        for name, entry in entries.items():
            if name not in field_names():
                hint = did_you_mean(str(name), field_names())
                raise ConfigError(f"space key {name!r} is no field of the configuration{hint}")
            try:
                domains[name] = Domain.parse(name, entry)
            except ConfigError as error:
                raise ConfigError(f"space key {name!r}: {error}") from None
        for name, domain in domains.items():
            for condition in domain.when:
                if condition.name not in base:
                    hint = did_you_mean(condition.name, list(base))
                    raise ConfigError(f"space key {name!r}: condition on unknown field {condition.name!r}{hint}")
        return cls(_in_order(domains), base)

    def active(self, domain: Domain, values: Mapping[str, Any]) -> bool:
        """Whether the conditions of a domain hold, where ``values`` has what stands before it."""
        return all(c.test(values.get(c.name, self.base[c.name])) for c in domain.when)

    def suggest(self, trial: optuna.Trial) -> dict[str, Scalar]:
        """Values of the active domains, drawn by the study's sampler."""
        values: dict[str, Scalar] = {}
        for name, domain in self.domains.items():
            if self.active(domain, values):
                values[name] = domain.suggest(trial)
        return values

    def point(self, fixed: Mapping[str, Any]) -> dict[str, Scalar]:
        """A point with the given values; the other active domains take the base's value, or an end of theirs."""
        values: dict[str, Scalar] = {}
        for name, domain in self.domains.items():
            if self.active(domain, values):
                own = self.base[name]
                values[name] = fixed[name] if name in fixed else own if own in domain else domain.ends[0]
        return values

    def reaching(self, name: str, value: Scalar) -> dict[str, Scalar]:
        """A point in which one domain is active and has the given value.

        Raises:
            ConfigError: Its conditions hold nowhere.
        """
        fixed: dict[str, Scalar] = {name: value}
        self._satisfy(self.domains[name], fixed)
        point = self.point(fixed)
        if name not in point:
            raise ConfigError(f"space key {name!r}: its conditions contradict each other: they never hold together")
        return point

    def _satisfy(self, domain: Domain, fixed: dict[str, Scalar]) -> None:
        for condition in domain.when:
            other = self.domains.get(condition.name)
            own = self.base[condition.name]
            candidates = [own] if other is None else ([own] if own in other else []) + other.ends
            if condition.name in fixed:
                candidates = [fixed[condition.name]]
            good = next((c for c in candidates if condition.test(c)), None)
            if good is None and not any(condition.test(c) for c in candidates):
                raise ConfigError(f"space key {domain.name!r}: its condition {condition.text} never holds")
            if other is not None:
                fixed[condition.name] = good
                self._satisfy(other, fixed)

    @property
    def size(self) -> float:
        """Number of points, conditions left aside; infinite with a continuous domain."""
        return math.prod(domain.size for domain in self.domains.values())


def _in_order(domains: dict[str, Domain]) -> dict[str, Domain]:
    """Domains sorted so that each stands after those in its conditions, else as written."""
    ordered: dict[str, Domain] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise ConfigError(f"space key {name!r}: its conditions go in a circle: {circle}")
        for other in _needs(domains[name]):
            if other in domains and other not in ordered:
                visit(other, (*path, name))
        ordered.setdefault(name, domains[name])

    for name in domains:
        visit(name, ())
    return ordered


def _needs(domain: Domain) -> Iterator[str]:
    return (condition.name for condition in domain.when)
