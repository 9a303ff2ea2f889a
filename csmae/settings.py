"""Reads a ``Config`` from what a user writes: YAML files, dotted names and ``--set`` options, with one-line errors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from csmae.config import Config, ConfigError


def parse_config(values: Mapping[str, Any], where: str) -> Config:
    """Validate a nested mapping.

    Args:
        values: Nested sections as in a YAML file.
        where: Start of each error line, such as the file's path.

    Raises:
        ConfigError: One line a mistake, each naming the dotted field.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        lines = error_lines(error.errors(), "a field of the configuration", field_names())
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def error_lines(
    items: Iterable[Mapping[str, Any]], what: str, known: Collection[str], prefix: str = ""
) -> Iterator[str]:
    """Describe each mistake that pydantic found in one line.

    Args:
        items: A ``ValidationError``'s errors.
        what: What an unknown name is not, such as ``a field of the configuration``.
        known: The names that it could have been.
        prefix: Start of every dotted name, such as ``search.``.
    """
    for item in items:
        name = prefix + ".".join(map(str, item["loc"]))
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            yield f"{name!r} is not {what}{did_you_mean(name, known)}"
        elif item["type"] == "value_error" and isinstance(item["input"], Mapping | BaseModel):
            yield message  # a check of several fields, which names them
        else:
            where = f"{name}: " if item["loc"] else ""
            yield f"{where}{message[:1].lower()}{message[1:]}, found {item['input']!r}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """End an error text with the known name nearest to an unknown one; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def field_names() -> list[str]:
    """Dotted names of all fields of the configuration."""
    return [name for name, _ in flatten(Config().model_dump())]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf of nested mappings."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge(nested: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Copy ``nested`` and set each dotted name of ``values``.

    Raises:
        ConfigError: Part of a dotted name is not a section.
    """
    result: dict[str, Any] = {
        key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in nested.items()
    }
    for name, value in values.items():
        *sections, last = name.split(".")
        section = result
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{name!r}: {part!r} is not a section of the configuration")
        section[last] = value
    return result


def load_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections such as 'model:', found {type(content).__name__}")
    return content


def parse_assignments(assignments: Iterable[str], also_known: Iterable[str] = ()) -> dict[str, Any]:
    """Read ``--set`` options such as ``masking.ratio=0.6``: values by dotted name.

    Args:
        assignments: The options' texts.
        also_known: Names that are allowed besides the configuration's fields.

    Raises:
        ConfigError: An option has no ``=``, an unknown name, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    known = [*field_names(), *also_known]
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: must be key=value, such as masking.ratio=0.6")
        if name not in known:
            raise ConfigError(f"--set {text}: {name!r} is not a field of the configuration{did_you_mean(name, known)}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {text}: the value is not YAML: quote it, as in --set 'key=[1, 2]'") from None
    return values
