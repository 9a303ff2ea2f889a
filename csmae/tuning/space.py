"""A search space: domains of configuration fields, and the conditions under which each is explored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna

from csmae.config import ConfigError
from csmae.settings import did_you_mean, field_names
from csmae.tuning.domain import Domain, Scalar


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

    def grid(self) -> Iterator[dict[str, Scalar]]:
        """Every point of a space of finite size, in the order of the file."""
        yield from self._grid(list(self.domains.values()), {})

    def _grid(self, domains: list[Domain], values: dict[str, Scalar]) -> Iterator[dict[str, Scalar]]:
        if not domains:
            yield values
        elif not self.active(domains[0], values):
            yield from self._grid(domains[1:], values)
        else:
            for value in domains[0].values:
                yield from self._grid(domains[1:], values | {domains[0].name: value})

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
