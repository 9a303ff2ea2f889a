"""A study: what to explore, from what base, and how. The one place where a search meets a training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from csmae.config import Config, ConfigError
from csmae.settings import did_you_mean, flatten, load_yaml, merge, parse_assignments, parse_config
from csmae.storage.layout import DATABASES, RESERVED
from csmae.study.metrics import TERMS
from csmae.study.options import Search
from csmae.study.space import Space
from csmae.study.values import Value

PARTS = ("base", "space", "search")

MAX_GRID = 10_000
"""Points that a grid may have."""

MAX_NAME = 128
"""Bytes of a study's name: a folder takes 255, an alias in MLflow, which the name is a part of, too."""

FIXED = ("eval.", "data.")
"""Fields that a space must not vary: they decide what a score means."""


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Args:
        name: Of the study in Optuna and MLflow, and of its folder.
        base: Nested sections, as written; what they leave out has the configuration's defaults.
        space: What varies.
        search: How.
    """

    name: str
    base: Mapping[str, Any]
    space: Space
    search: Search

    def resolve(self, values: Mapping[str, Any]) -> Config:
        """The configuration of a point of the space.

        Raises:
            ConfigError: The values do not go together; one line a mistake.
        """
        point = ", ".join(f"{name}={value}" for name, value in values.items())
        config = parse_config(merge(self.base, values), point or "base")
        workers = self.search.workers_per_trial
        if config.optim.batch_size % workers:
            raise ConfigError(
                f"{point or 'base'}: optim.batch_size must be a multiple of search.workers_per_trial: "
                f"{config.optim.batch_size} on {workers} workers"
            )
        return config

    def starts(self) -> Iterator[dict[str, Value]]:
        """Points to try before the sampler's own; where the base lies outside a domain, an end of it stands in."""
        yield from (self.space.point(entry) for entry in self.search.start_from)

    @property
    def longest(self) -> int:
        """Epochs of the longest training that the space has."""
        name = "train.epochs"
        ends = self.space.domains[name].ends if name in self.space.domains else [self.space.base[name]]
        return max(int(end) for end in ends if isinstance(end, int | float))

    def first(self) -> Config:
        """The configuration to try first; the base where no point is named."""
        return self.resolve(next(self.starts(), {}))

    def definition(self) -> dict[str, Any]:
        """What must stay the same when the study is resumed."""
        space = {name: str(domain) for name, domain in self.space.domains.items()}
        return {"base": self.resolve({}).model_dump(mode="json"), "space": space, "search": self.search.definition()}


def load_study(path: Path, name: str | None = None, assignments: list[str] | None = None) -> Study:
    """Read a study file and check all of it: base, every key, both ends of every domain, the starting points.

    Args:
        path: YAML with sections ``base``, ``space``, ``search``.
        name: Of the study; the file's own where None.
        assignments: ``--set`` options. A field of the configuration is fixed at its value and leaves the space;
            ``search.…`` overrides that section.

    Raises:
        ConfigError: One line a mistake, each beginning with the file's path.
    """
    content = load_yaml(path)
    try:
        _check_parts(content)
        fields, search = _split(assignments or [])
        base = merge({}, dict(flatten(content.get("base") or {})) | fields)
        settings = _parse_search({**(content.get("search") or {}), **search})
        values = dict(flatten(parse_config(base, "base").model_dump(mode="json")))
        entries = {key: entry for key, entry in (content.get("space") or {}).items() if key not in fields}
        study = Study(name or path.stem, base, Space.parse(entries, values), settings)
        _check_name(study.name)
        _check_space(study)
        _check_grid(study)
        _check_starts(study)
        _check_grace(study)
        _check_constraints(study)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return study


def _check_parts(content: Mapping[str, Any]) -> None:
    for key, part in content.items():
        if key not in PARTS:
            raise ConfigError(f"{key!r} is no section of a study{did_you_mean(str(key), list(PARTS))}")
        if part is not None and not isinstance(part, dict):
            raise ConfigError(f"section {key!r} must hold names and values, found {type(part).__name__}")


def _check_name(name: str) -> None:
    """A study's name is that of its folder, its experiment in MLflow, and a word of the commands that are printed."""
    if not name or name[0] in "-." or not all(c.isalnum() or c in "-_." for c in name):
        raise ConfigError(
            "the study's name must be of letters, digits, '-', '_' and '.', and begin with none of '-' and '.', "
            f"found {name!r}: use --name"
        )
    if len(name.encode()) > MAX_NAME:
        raise ConfigError(
            f"the study's name must have at most {MAX_NAME} bytes, found {len(name.encode())}: use --name"
        )
    if name.casefold().startswith(DATABASES) or name.casefold() in RESERVED:
        raise ConfigError(
            f"a study cannot be named {name!r}: the storage has a file or folder of its own there: use --name"
        )


def _split(assignments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the configuration, and options of the section ``search``."""
    search: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if name.startswith("search.") and equals:
            try:
                search[name.removeprefix("search.")] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ConfigError(f"--set {text}: the value is no YAML: quote it, as in --set 'key=[1, 2]'") from None
    return parse_assignments([text for text in assignments if not text.startswith("search.")]), search


def _parse_search(values: Mapping[str, Any]) -> Search:
    known = list(Search.model_fields)
    for key in values:
        if key not in known:
            raise ConfigError(f"search key {key!r} is no setting of a search{did_you_mean(str(key), known)}")
    try:
        return Search.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(map(_explain, error.errors()))) from None


def _explain(item: Mapping[str, Any]) -> str:
    message = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return str(message)
    return f"search.{'.'.join(map(str, item['loc']))}: {message[:1].lower()}{message[1:]}, found {item['input']!r}"


def _check_space(study: Study) -> None:
    if not study.space.domains:
        raise ConfigError("the space is empty: name at least one field under 'space'")
    for name, domain in study.space.domains.items():
        if name.startswith(FIXED):
            raise ConfigError(f"space key {name!r}: scores do not compare across it: set it in 'base'")
        for end in domain.ends:
            _check_point(study, study.space.reaching(name, end), f"space key {name!r} at {end}")


def _check_grid(study: Study) -> None:
    if study.search.sampler == "grid" and study.space.size > MAX_GRID:
        endless = [name for name, domain in study.space.domains.items() if math.isinf(domain.size)]
        why = f"{endless[0]} has no step" if endless else f"found {study.space.size:,.0f} points"
        raise ConfigError(f"search.sampler grid needs a space of at most {MAX_GRID:,} points: {why}")


def _check_starts(study: Study) -> None:
    for entry in study.search.start_from:
        for name, value in entry.items():
            if name not in study.space.domains:
                hint = did_you_mean(name, list(study.space.domains))
                raise ConfigError(f"search.start_from: {name!r} is not in the space{hint}")
            if value not in study.space.domains[name]:
                raise ConfigError(
                    f"search.start_from: {name} {value} is outside its domain: {study.space.domains[name]}"
                )
        _check_point(study, study.space.point(entry), "search.start_from")


def _check_grace(study: Study) -> None:
    search = study.search
    if search.scheduler != "none" and search.grace_epochs > study.longest:
        raise ConfigError(
            f"search.grace_epochs {search.grace_epochs} is more than train.epochs {study.longest}, so that no trial could be "
            "stopped early: lower it, or set search.scheduler to none"
        )


def _check_constraints(study: Study) -> None:
    """Refuse a constraint on a loss term that no configuration of the study computes."""
    for name in study.search.constraints:
        for weight in TERMS.get(name, ()):
            domain = study.space.domains.get(weight)
            if not any(domain.ends if domain else [study.space.base[weight]]):
                raise ConfigError(f"search.constraints: no configuration computes {name!r}: {weight} is 0")


def _check_point(study: Study, point: Mapping[str, Value], where: str) -> None:
    try:
        study.resolve(point)
    except ConfigError as error:
        lines = (line.partition(": ")[2] for line in str(error).splitlines())
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None
