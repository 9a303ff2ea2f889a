"""Reads a ``Config`` from what a user writes: YAML files, dotted names and ``--set`` options, with one-line errors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from csmae.changes import AFTER_EPOCH, CHANGEABLE, values_at
from csmae.config import Config, ConfigError, one_line

ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class Names:
    """The names that a user can write in one place.

    Args:
        what: What each of them is, such as ``a field of the configuration``.
        known: The names, without the prefix.
        prefix: Start of every name in an error text, such as ``search.``.
    """

    what: str
    known: Collection[str]
    prefix: str = ""

    def reject(self, name: str) -> str:
        """Say that a name, given without the prefix, is not one of them; suggest the nearest one."""
        return f"{self.prefix + name!r} is not {self.what}{did_you_mean(name, self.known, self.prefix)}"


def validate(model: type[ModelT], values: Mapping[str, Any], names: Names, where: str = "") -> ModelT:
    """Build a model from nested values.

    Args:
        model: The model's class.
        values: Nested sections as in a YAML file.
        names: The model's fields.
        where: Start of each error line.

    Raises:
        ConfigError: One line per mistake, each naming the dotted field.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(where + line for line in error_lines(error.errors(), names))) from None


def parse_config(values: Mapping[str, Any], where: str) -> Config:
    """Validate a nested mapping.

    Args:
        values: Nested sections as in a YAML file.
        where: Start of each error line, such as the file's path.

    Raises:
        ConfigError: One line per mistake, each naming the dotted field.
    """
    config = validate(Config, values, FIELDS, f"{where}: ")
    _check_changes(config, f"{where}: train.changes")
    return config


def _check_changes(config: Config, where: str) -> None:
    """Check ``train.changes``: the epochs ascend, and each change leads to a valid configuration of the same network.

    Raises:
        ConfigError: One line per mistake.
    """
    before, last = 0, config.train.epochs - 1
    for index, change in enumerate(config.train.changes):
        epoch = change.get(AFTER_EPOCH)
        if type(epoch) is not int or not before < epoch <= last:
            raise ConfigError(
                f"{where}.{index}.after_epoch must be a whole number from {before + 1} to {last}, found {epoch!r}"
            )
        before = epoch
        for name in change.keys() - CHANGEABLE - {AFTER_EPOCH}:
            raise ConfigError(f"{where}.{index}: {name!r} cannot change in a training{did_you_mean(name, CHANGEABLE)}")
        changed = validate(Config, values_at(config, epoch), FIELDS, f"{where}.{index}: ")
        if changed.loss.parts != config.loss.parts:
            raise ConfigError(
                f"{where}.{index}: the loss weights change the network: they must stay 0 or stay positive"
            )


def error_lines(items: Iterable[Mapping[str, Any]], names: Names) -> Iterator[str]:
    """Describe each mistake that pydantic found in one line.

    A validator raises ``ConfigError`` with a text that names the fields, or ``ValueError`` with the rest of a sentence
    that begins with the field, such as ``must be longer than 0``.

    Args:
        items: A ``ValidationError``'s errors.
        names: The fields of what was validated.
    """
    for item in items:
        name, message = ".".join(map(str, item["loc"])), str(item["msg"])
        cause = item.get("ctx", {}).get("error")
        if item["type"] == "extra_forbidden":
            yield names.reject(name)
        elif isinstance(cause, ConfigError):
            yield str(cause)
        elif isinstance(cause, ValueError):
            yield f"{names.prefix}{name} {cause}, found {item['input']!r}"
        else:
            where = f"{names.prefix}{name}: " if name else ""
            yield f"{where}{message[:1].lower()}{message[1:]}, found {item['input']!r}"


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """End an error text with the known name nearest to an unknown one; empty if none is near.

    Args:
        name: The unknown name.
        known: The known names.
        prefix: Start of every name in the text; ``name`` and ``known`` omit it, as it would make all of them similar.
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf of nested mappings."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


FIELDS = Names("a field of the configuration", [name for name, _ in flatten(Config().model_dump())])
"""Dotted names of all fields of the configuration."""


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
        raise ConfigError(f"{path}: is not YAML: {one_line(error, None)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections such as 'model:', found {type(content).__name__}")
    return content


def parse_assignments(assignments: Iterable[str], others: Names | None = None) -> dict[str, Any]:
    """Read ``--set`` options such as ``masking.ratio=0.6``: values by dotted name.

    Args:
        assignments: The options' texts.
        others: Names with a prefix that are allowed besides the configuration's fields.

    Raises:
        ConfigError: An option has no ``=``, an unknown name, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: must be key=value, such as masking.ratio=0.6")
        names = others if others and name.startswith(others.prefix) else FIELDS
        if name.removeprefix(names.prefix) not in names.known:
            raise ConfigError(f"--set {text}: {names.reject(name.removeprefix(names.prefix))}")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {text}: the value is not YAML: quote it, as in --set 'key=[1, 2]'") from None
    return values
