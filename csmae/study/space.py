"""A search space: domains of configuration fields, and the conditions under which each is explored."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution

from csmae.config import ConfigError
from csmae.engine_logs import quiet_optuna
from csmae.settings import did_you_mean, field_names
from csmae.study.domain import Domain
from csmae.study.values import Value, packed

MAX_CANDIDATES = 20
"""Values of a domain that are all tried to make a condition on it hold."""


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
                others = domains[condition.name].ends if condition.name in domains else [base[condition.name]]
                if condition.compares and any(isinstance(other, str | list) for other in others):
                    raise ConfigError(
                        f"space key {name!r}: condition {condition.text}: {condition.name} is not a number"
                    )
        return cls(_in_order(domains), base)

    def active(self, domain: Domain, values: Mapping[str, Any]) -> bool:
        """Whether the conditions of a domain hold, where ``values`` has what stands before it."""
        return all(c.test(values.get(c.name, self.base[c.name])) for c in domain.when)

    def suggest(self, trial: optuna.Trial) -> dict[str, Value]:
        """Values of the active domains, drawn by the study's sampler."""
        return self._fill(lambda domain: domain.suggest(trial))

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A point as Optuna holds it."""
        return {name: packed(value) for name, value in values.items()}

    def decode(self, params: Mapping[str, Any]) -> dict[str, Value]:
        """A point from Optuna's record."""
        return {name: self.domains[name].decode(stored) for name, stored in params.items()}

    def samples(self, seed: int) -> Iterator[dict[str, Value]]:
        """Points at random, without end."""
        quiet_optuna()
        chance = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        while True:
            yield self.suggest(chance.ask())

    def point(self, fixed: Mapping[str, Any]) -> dict[str, Value]:
        """A point with the given values; the other active domains take the base's value, or an end of theirs."""

        def choose(domain: Domain) -> Value:
            own: Value = fixed.get(domain.name, self.base[domain.name])
            if own in domain:
                return domain.fit(own)
            return own if domain.name in fixed else domain.ends[0]

        return self._fill(choose)

    def _fill(self, choose: Callable[[Domain], Value]) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for name, domain in self.domains.items():
            if self.active(domain, values):
                values[name] = choose(domain)
        return values

    def grid(self) -> Iterator[dict[str, Value]]:
        """Every point of a space of finite size, in the order of the file."""
        yield from self._grid(list(self.domains.values()), {}, lambda domain: domain.values)

    def _grid(
        self, domains: list[Domain], values: dict[str, Value], of: Callable[[Domain], list[Value]]
    ) -> Iterator[dict[str, Value]]:
        if not domains:
            yield values
        elif not self.active(domains[0], values):
            yield from self._grid(domains[1:], values, of)
        else:
            for value in of(domains[0]):
                yield from self._grid(domains[1:], values | {domains[0].name: value}, of)

    def reaching(self, name: str, value: Value) -> dict[str, Value]:
        """A point in which one domain is active and has the given value.

        Raises:
            ConfigError: Its conditions hold nowhere.
        """
        domain, before = self.domains[name], self._behind(name)
        found = (values for values in self._grid(before, {}, self._candidates) if self.active(domain, values))
        values = next(found, None)
        if values is None:
            conditions = " and ".join(condition.text for condition in domain.when)
            raise ConfigError(
                f"space key {name!r}: its condition {conditions} never holds: remove the key, or widen what the condition names"
            )
        return self.point({**values, name: value})

    def _behind(self, name: str) -> list[Domain]:
        """Domains on which conditions of one depend, and theirs, in order."""
        needed = {name}
        for other in reversed(self.domains):
            if other in needed:
                needed.update(_needs(self.domains[other]))
        return [domain for other, domain in self.domains.items() if other in needed and other != name]

    def _candidates(self, domain: Domain) -> list[Value]:
        """Values of a domain among which are some for each condition on it: all, or of many its landmarks."""
        if domain.size <= MAX_CANDIDATES or isinstance(domain.distribution, CategoricalDistribution):
            return domain.values
        named = [v for d in self.domains.values() for c in d.when if c.name == domain.name for v in c.named]
        marks = sorted({float(mark) for mark in (*domain.ends, *named) if isinstance(mark, int | float)})
        if math.isfinite(domain.size):  # each mark, and a step before and after it
            near = [heapq.nsmallest(3, domain.values, key=lambda value: abs(value - mark)) for mark in marks]  # type: ignore[operator]
        else:
            near = [[low, (low + high) / 2, high] for low, high in pairwise(marks)]
        return [domain.fit(value) for value in (self.base[domain.name], *chain.from_iterable(near)) if value in domain]

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
            raise ConfigError(f"space key {name!r}: its conditions are circular: {circle}: remove one of them")
        for other in _needs(domains[name]):
            if other in domains and other not in ordered:
                visit(other, (*path, name))
        ordered.setdefault(name, domains[name])

    for name in domains:
        visit(name, ())
    return ordered


def _needs(domain: Domain) -> Iterator[str]:
    return (condition.name for condition in domain.when)
