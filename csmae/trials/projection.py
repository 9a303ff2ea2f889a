"""The best configurations of another study as points of this study's space, whatever space and archive they come from."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution

from csmae.config import Config, ConfigError, Data
from csmae.data.archive import data_name, open_archive
from csmae.settings import flatten, merge, parse_config
from csmae.study.domain import Domain
from csmae.study.study import Study
from csmae.study.values import Value, finite_number
from csmae.trials.attributes import BASE, DEFINITION
from csmae.trials.leaderboard import LeaderboardEntry, leaderboard
from csmae.trials.trial import params_of


class Similarity(Enum):
    """How similar the archives of two studies are; the value is how many best configurations one gives to the other."""

    SAME = 5
    """The same archive, possibly at another path or another part of it."""
    KIND = 3
    """Another archive of the same kind: BigEarthNet v1, v2, or synthetic."""
    OTHER = 1
    """Another kind of archive, or one that cannot be opened here."""


def compare_data(source: optuna.Study, study: Study) -> Similarity:
    """Compare the archives of two studies."""
    before, now = (parse_config(base, "base").data for base in (source.user_attrs[BASE], study.base))
    places = [(data.path, data.splits_dir, data.synthetic if _is_synthetic(data) else None) for data in (before, now)]
    if places[0] == places[1]:
        return Similarity.SAME
    if _is_synthetic(before) or _is_synthetic(now):
        return Similarity.KIND if _is_synthetic(before) and _is_synthetic(now) else Similarity.OTHER
    try:
        if data_name(before) == data_name(now):
            return Similarity.SAME
        return Similarity.KIND if open_archive(before).version == open_archive(now).version else Similarity.OTHER
    except ConfigError:  # one of the archives is not there any more
        return Similarity.OTHER


def _is_synthetic(data: Data) -> bool:
    """Whether a configuration uses the synthetic archive."""
    return data.path == "synthetic"


def best_points(source: optuna.Study, study: Study, similarity: Similarity) -> Iterator[tuple[int, dict[str, Value]]]:
    """Project the best configurations of another study into the space, best first; those that are invalid there are left out.

    Args:
        source: The other study; its first objective is this study's.
        study: This study.
        similarity: Of their archives: how many configurations are projected.

    Yields:
        Number of the source's trial, and the point.
    """
    for entry in _ranked(source, study)[: similarity.value]:
        try:
            config = parse_config(merge(source.user_attrs[BASE], params_of(entry.trial)), "")
            point = project(config, study)
            study.resolve(point)
        except ConfigError:  # the configuration has lost a field, or the values do not fit together here
            continue
        yield entry.trial.number, point


def _ranked(source: optuna.Study, study: Study) -> list[LeaderboardEntry]:
    """The source's leaderboard; by the first objective alone if the studies have only this one in common."""
    entries = leaderboard(source).entries
    if source.user_attrs[DEFINITION]["search"]["objectives"] == study.definition()["search"]["objectives"]:
        return entries
    return sorted(entries, key=lambda entry: -study.search.signs[0] * entry.mean)


def project(config: Config, study: Study) -> dict[str, Value]:
    """Find the point of a space that is nearest to a configuration.

    A number outside its domain takes the nearest value of the domain; any other value outside its domain, the base's.
    """
    values = flatten(config.model_dump(mode="json"))
    domains = study.space.domains
    nearest = {name: _nearest(domains[name], value) for name, value in values if name in domains}
    return study.space.point({name: value for name, value in nearest.items() if value in domains[name]})


def _nearest(domain: Domain, value: Any) -> Any:
    """The value of a domain that is nearest to a value; the value itself if it belongs to the domain or is not a number."""
    number, distribution = finite_number(value), domain.distribution
    if value in domain or number is None:
        return value
    if isinstance(distribution, CategoricalDistribution):
        numbers = [choice for choice in domain.ends if finite_number(choice) is not None]
        return min(numbers, key=lambda choice: abs(float(str(choice)) - number), default=value)
    clipped = min(max(number, distribution.low), distribution.high)
    if distribution.step is None:
        return clipped
    return domain.decode(distribution.low + round((clipped - distribution.low) / distribution.step) * distribution.step)
