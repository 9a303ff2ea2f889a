"""From what a user writes to a ``Config``: YAML files, dotted names, ``--set`` options, and one-line errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from csmae.config import Config, ConfigError


def parse_config(values: Mapping[str, Any], where: str) -> Config:
    """Validate a nested mapping.

    Args:
        values: Nested sections as in a YAML file.
        where: Named at the start of an error, such as the file's path.

    Raises:
        ConfigError: One line a mistake, each naming the dotted field.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        lines = (_explain(dict(item)) for item in error.errors())
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def _explain(item: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{name!r} is no field of the configuration{did_you_mean(name, field_names())}"
    if item["type"] == "value_error":
        return str(item["msg"]).removeprefix("Value error, ")
    message = str(item["msg"])
    return f"{name}: {message[:1].lower()}{message[1:]}, found {item['input']!r}"


def did_you_mean(name: str, known: list[str]) -> str:
    """The end of an error text: the known name nearest to an unknown one, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def field_names() -> list[str]:
    """Every field's dotted name, in the order of the file."""
    return [name for name, _ in flatten(Config().model_dump())]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted name and value of nested mappings."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge(nested: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``nested`` in which each dotted name of ``values`` has its value.

    Raises:
        ConfigError: A dotted name runs through something that is no section.
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
                raise ConfigError(f"{name!r}: {part!r} is no section of the configuration")
        section[last] = value
    return result


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: No such file, not YAML, or no mapping.
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


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Dotted names and values of ``--set`` options such as ``masking.ratio=0.6``.

    Raises:
        ConfigError: An option without ``=``, an unknown name, or a value that is no YAML.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: must be key=value, such as masking.ratio=0.6")
        if name not in field_names():
            raise ConfigError(
                f"--set {text}: {name!r} is no field of the configuration{did_you_mean(name, field_names())}"
            )
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {text}: the value is no YAML: quote it, as in --set 'key=[1, 2]'") from None
    return values
