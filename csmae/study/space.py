"""A search space: domains of configuration fields, and the conditions under which each is varied."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import optuna

from csmae.config import ConfigError
from csmae.engine_logs import quiet_optuna
from csmae.settings import FIELDS, did_you_mean
from csmae.study.condition import Comparison, describe, holds, named_values
from csmae.study.domain import ChoiceDomain, Domain, parse_domain
from csmae.study.values import Value, encode_value

MAX_CANDIDATES = 20
"""Size of a domain up to which all of its values are tried to satisfy a condition."""


@dataclass(frozen=True)
class Space:
    """Domains, ordered such that every condition names an earlier one.

    Args:
        domains: By name.
        base: The base configuration's values by dotted name; conditions on fields outside the space read them.
    """

    domains: dict[str, Domain]
    base: Mapping[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, entries: Mapping[str, Any], base: Mapping[str, Any]) -> Space:
        """Read the section ``space`` of a study file.

        Raises:
            ConfigError: A field is unknown, an entry is not a domain, or a condition names an unknown field, compares what
                is not a number, or is circular.
        """
        domains: dict[str, Domain] = {}
        for name, entry in entries.items():
            if name not in FIELDS.known:
                raise ConfigError(f"space key {FIELDS.reject(str(name))}")
            try:
                domains[name] = parse_domain(name, entry)
            except ConfigError as error:
                lines = str(error).splitlines()
                raise ConfigError("\n".join(f"space key {name!r}: {line}" for line in lines)) from None
        for name, domain in domains.items():
            for other, condition in domain.when.items():
                if other not in base:
                    hint = did_you_mean(other, base)
                    raise ConfigError(f"space key {name!r}: condition on unknown field {other!r}{hint}")
                values = domains[other].ends if other in domains else [base[other]]
                if isinstance(condition, Comparison) and any(isinstance(value, str | list) for value in values):
                    raise ConfigError(
                        f"space key {name!r}: condition {describe(other, condition)}: {other} is not a number"
                    )
        return cls(_sort(domains), base)

    def is_active(self, domain: Domain, values: Mapping[str, Any]) -> bool:
        """Whether the conditions of a domain hold at a point that has the values of all earlier domains."""
        return all(holds(condition, values.get(name, self.base[name])) for name, condition in domain.when.items())

    def suggest(self, trial: optuna.Trial) -> dict[str, Value]:
        """Draw the values of the active domains with the study's sampler."""
        return self._fill(lambda domain: domain.suggest(trial))

    def encode(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a point to what Optuna stores."""
        return {name: encode_value(value) for name, value in values.items()}

    def samples(self, seed: int) -> Iterator[dict[str, Value]]:
        """Draw random points without end."""
        quiet_optuna()
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        while True:
            yield self.suggest(study.ask())

    def point(self, fixed: Mapping[str, Any]) -> dict[str, Value]:
        """Complete a point: active domains without a fixed value take the base's value, or their first end."""

        def choose(domain: Domain) -> Value:
            value: Value = fixed.get(domain.name, self.base[domain.name])
            if value in domain:
                return domain.fit(value)
            return value if domain.name in fixed else domain.ends[0]

        return self._fill(choose)

    @property
    def has_priors(self) -> bool:
        """Whether any domain has a prior."""
        return any(domain.prior for domain in self.domains.values())

    def prior_center(self) -> dict[str, Value]:
        """The point at the centers of all priors, otherwise as the base."""
        return self.point({name: domain.prior.center for name, domain in self.domains.items() if domain.prior})

    def _fill(self, choose: Callable[[Domain], Value]) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for name, domain in self.domains.items():
            if self.is_active(domain, values):
                values[name] = choose(domain)
        return values

    def grid(self) -> Iterator[dict[str, Value]]:
        """Yield every point of a space of finite size."""
        yield from self._grid(list(self.domains.values()), {}, lambda domain: domain.values)

    def _grid(
        self, domains: list[Domain], values: dict[str, Value], candidates: Callable[[Domain], list[Value]]
    ) -> Iterator[dict[str, Value]]:
        if not domains:
            yield values
        elif not self.is_active(domains[0], values):
            yield from self._grid(domains[1:], values, candidates)
        else:
            for value in candidates(domains[0]):
                yield from self._grid(domains[1:], values | {domains[0].name: value}, candidates)

    def point_with(self, name: str, value: Value) -> dict[str, Value]:
        """Find a point in which a domain is active and has the given value.

        Raises:
            ConfigError: The domain's conditions never hold.
        """
        domain = self.domains[name]
        points = self._grid(self._dependencies(name), {}, self._candidates)
        values = next((values for values in points if self.is_active(domain, values)), None)
        if values is None:
            raise ConfigError(
                f"space key {name!r}: its condition {domain.conditions} never holds: "
                "remove the key, or widen what the condition names"
            )
        return self.point({**values, name: value})

    def _dependencies(self, name: str) -> list[Domain]:
        """Domains that a domain's conditions name, directly or through others, in order."""
        needed = {name}
        for other in reversed(self.domains):
            if other in needed:
                needed.update(self.domains[other].when)
        return [domain for other, domain in self.domains.items() if other in needed and other != name]

    def _candidates(self, domain: Domain) -> list[Value]:
        """Values of a domain that include some for each condition on it: all, or those around the values it is compared with."""
        if isinstance(domain, ChoiceDomain) or domain.size <= MAX_CANDIDATES:
            return domain.values
        named = [v for d in self.domains.values() if domain.name in d.when for v in named_values(d.when[domain.name])]
        marks = sorted({float(mark) for mark in (*domain.ends, *named) if isinstance(mark, int | float)})
        if math.isfinite(domain.size):  # each mark, and a step before and after it
            near = [heapq.nsmallest(3, domain.values, key=lambda value: abs(value - mark)) for mark in marks]  # type: ignore[operator]
        else:
            near = [[low, (low + high) / 2, high] for low, high in pairwise(marks)]
        return [domain.fit(value) for value in (self.base[domain.name], *chain.from_iterable(near)) if value in domain]

    @property
    def size(self) -> float:
        """Number of points if all conditions held; infinite with a continuous domain."""
        return math.prod(domain.size for domain in self.domains.values())


def _sort(domains: dict[str, Domain]) -> dict[str, Domain]:
    """Put each domain after those that its conditions name, and otherwise keep the order of the file."""
    ordered: dict[str, Domain] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise ConfigError(f"space key {name!r}: its conditions are circular: {circle}: remove one of them")
        for other in domains[name].when:
            if other in domains and other not in ordered:
                visit(other, (*path, name))
        ordered.setdefault(name, domains[name])

    for name in domains:
        visit(name, ())
    return ordered
