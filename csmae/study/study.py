"""A study: what to explore, from which base configuration, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csmae.config import Config, ConfigError, Section
from csmae.model.cost import checkpoint_bytes
from csmae.settings import Names, did_you_mean, flatten, load_yaml, merge, parse_assignments, parse_config, validate
from csmae.storage.layout import DATABASES, RESERVED
from csmae.study.metrics import TERMS
from csmae.study.options import Confirm, Search, StopWhen, num_bytes
from csmae.study.pbt import Pbt, check_pbt
from csmae.study.space import Space
from csmae.study.values import Value

PARTS = ("base", "space", "search")
"""Sections of a study file."""

SEARCH = "search."
"""Prefix of the dotted names of the section ``search``."""

SETTINGS = Names("a setting of the search", tuple(Search.model_fields), SEARCH)
"""What ``--set search.…`` can name."""

SECTIONS: dict[str, type[Section]] = {"confirm": Confirm, "pbt": Pbt, "stop_when": StopWhen}

NESTED_SETTINGS = replace(
    SETTINGS,
    known=(
        *SETTINGS.known,
        *(f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields),
    ),
)
"""What the section ``search`` can name."""

FIXED = ("eval.", "data.", "train.changes")
"""Prefixes of the fields that a space must not vary: they decide what a score means, or hold values of several fields."""

MAX_GRID = 10_000
"""Maximum number of points of a grid."""

MAX_NAME = 128
"""Maximum number of bytes of a study's name: a folder's name has at most 255, and so has the alias in MLflow that contains it."""


@dataclass(frozen=True)
class Study:
    """A validated study file.

    Args:
        name: Names the study in Optuna and MLflow, and its folder.
        base: Nested sections, as written; what they omit has the configuration's defaults.
        space: What varies.
        search: How the space is explored.
    """

    name: str
    base: Mapping[str, Any]
    space: Space
    search: Search

    def resolve(self, values: Mapping[str, Any]) -> Config:
        """Build the configuration of a point of the space.

        Raises:
            ConfigError: The combination of values is invalid; one line per mistake.
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

    def starting_points(self) -> Iterator[dict[str, Value]]:
        """Yield the starting points; where the base's value is outside a domain, they have the domain's first end."""
        return map(self.space.point, self.search.start_from)

    @property
    def max_epochs(self) -> int:
        """Epochs of the longest training in the space."""
        name = "train.epochs"
        ends = self.space.domains[name].ends if name in self.space.domains else [self.space.base[name]]
        return max(int(end) for end in ends if isinstance(end, int | float))

    def first_config(self) -> Config:
        """The configuration of the first starting point; without any, the base."""
        return self.resolve(next(self.starting_points(), {}))

    def definition(self) -> dict[str, Any]:
        """What must stay the same when the study is resumed."""
        space = {name: str(domain) for name, domain in self.space.domains.items()}
        return {"base": self.resolve({}).model_dump(mode="json"), "space": space, "search": self.search.definition()}


def load_study(path: Path, name: str | None = None, assignments: list[str] | None = None) -> Study:
    """Read a study file and validate all of it: base, every key, both ends of every domain, the starting points.

    Args:
        path: YAML file with the sections ``base``, ``space`` and ``search``.
        name: The study's name; by default the file's.
        assignments: ``--set`` options. A field of the configuration is fixed at its value and leaves the space;
            ``search.…`` overrides that section.

    Raises:
        ConfigError: One line per mistake, each beginning with the file's path.
    """
    content = load_yaml(path)
    try:
        _check_parts(content)
        values = parse_assignments(assignments or [], SETTINGS)
        settings = {key.removeprefix(SEARCH): value for key, value in values.items() if key.startswith(SEARCH)}
        fields = {key: value for key, value in values.items() if not key.startswith(SEARCH)}
        search = validate(Search, {**(content.get("search") or {}), **settings}, NESTED_SETTINGS)
        base = merge({}, dict(flatten(content.get("base") or {})) | fields)
        base_values = dict(flatten(parse_config(base, "base").model_dump(mode="json")))
        entries = {key: entry for key, entry in (content.get("space") or {}).items() if key not in fields}
        study = Study(name or path.stem, base, Space.parse(entries, base_values), search)
        _check_name(study.name)
        _check_space(study)
        _check_grid(study)
        _check_starts(study)
        _check_grace(study)
        if study.search.strategy == "pbt":
            check_pbt(study)
        _check_constraints(study)
        _check_disk_limit(study)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return study


def _check_parts(content: Mapping[str, Any]) -> None:
    for key, part in content.items():
        if key not in PARTS:
            raise ConfigError(f"{key!r} is not a section of a study{did_you_mean(str(key), PARTS)}")
        if part is not None and not isinstance(part, dict):
            raise ConfigError(f"section {key!r} must hold names and values, found {type(part).__name__}")


def _check_name(name: str) -> None:
    """Reject a name that cannot be that of a folder and of an MLflow experiment, or needs quotes in a shell."""
    if not name or name[0] in "-." or not all(c.isalnum() or c in "-_." for c in name):
        raise ConfigError(
            "the study's name must consist of letters, digits, '-', '_' and '.', and not begin with '-' or '.', "
            f"found {name!r}: use --name"
        )
    if len(name.encode()) > MAX_NAME:
        raise ConfigError(
            f"the study's name must have at most {MAX_NAME} bytes, found {len(name.encode())}: use --name"
        )
    if name.casefold().startswith(DATABASES) or name.casefold() in RESERVED:
        raise ConfigError(f"a study cannot be named {name!r}, as a file of the storage has this name: use --name")


def _check_space(study: Study) -> None:
    if not study.space.domains:
        raise ConfigError("the space is empty: name at least one field under 'space'")
    for name, domain in study.space.domains.items():
        if name.startswith(FIXED):
            why = "holds values of several fields" if name == "train.changes" else "scores do not compare across it"
            raise ConfigError(f"space key {name!r}: {why}: set it in 'base'")
        for end in domain.ends:
            _check_point(study, study.space.point_with(name, end), f"space key {name!r} at {end}")


def _check_grid(study: Study) -> None:
    if study.search.sampler == "grid" and study.space.size > MAX_GRID:
        continuous = [name for name, domain in study.space.domains.items() if math.isinf(domain.size)]
        why = f"{continuous[0]} has no step" if continuous else f"found {study.space.size:,.0f} points"
        raise ConfigError(f"search.sampler grid needs a space of at most {MAX_GRID:,} points: {why}")


def _check_starts(study: Study) -> None:
    for entry in study.search.start_from:
        for name, value in entry.items():
            if name not in study.space.domains:
                hint = did_you_mean(name, study.space.domains)
                raise ConfigError(f"search.start_from: {name!r} is not in the space{hint}")
            if value not in study.space.domains[name]:
                raise ConfigError(
                    f"search.start_from: {name} {value} is outside its domain: {study.space.domains[name]}"
                )
        _check_point(study, study.space.point(entry), "search.start_from")


def _check_grace(study: Study) -> None:
    search = study.search
    if search.strategy not in ("none", "pbt") and (search.grace_epochs or 1) > study.max_epochs:
        raise ConfigError(
            f"search.grace_epochs {search.grace_epochs} is more than train.epochs {study.max_epochs}, so no trial could be "
            "stopped early: lower it, or set search.strategy to none"
        )


def _check_disk_limit(study: Study) -> None:
    """Reject a limit below the checkpoint of the base configuration."""
    limit, needed = study.search.disk_limit, checkpoint_bytes(study.resolve({}))
    if limit and num_bytes(limit) < needed:
        raise ConfigError(
            f"search.disk_limit {limit} is less than one checkpoint, about {needed / 1e6:,.0f}MB: raise it, or remove it"
        )


def _check_constraints(study: Study) -> None:
    """Reject a constraint on a loss term that no configuration of the study computes."""
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
