"""Values of configuration fields as a study file writes them: numbers that YAML reads as text, and lists."""

from __future__ import annotations

import json
import math
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from csmae.config import Config

Scalar = str | bool | int | float | None
"""What Optuna can hold as a choice."""

Value = Scalar | list[Any]
"""What a field can be."""


def field_types(name: str) -> tuple[Any, ...]:
    """The types that a field of the configuration takes, those of its items included; none for an unknown field."""
    annotation = _annotation(name)
    return () if annotation is None else (annotation, *get_args(annotation))


def takes_lists(name: str) -> bool:
    """Whether a field's value is a list."""
    return get_origin(_annotation(name)) in (tuple, list)


def _annotation(name: str) -> Any:
    model: Any = Config
    *sections, last = name.split(".")
    for section in sections:
        field = getattr(model, "model_fields", {}).get(section)
        model = field.annotation if field else None
    field = model.model_fields.get(last) if isinstance(model, type) and issubclass(model, BaseModel) else None
    return field.annotation if field else None


def plain(name: str, value: Any) -> Any:
    """A value as the field means it: text that is a number (YAML reads ``1e-3`` as text) becomes one, a tuple a list."""
    if isinstance(value, list | tuple):
        return [plain(name, item) for item in value]
    types = field_types(name)
    if not isinstance(value, str) or str in types or not (float in types or int in types):
        return value
    number = finite(value)
    if number is None:
        return value
    return int(number) if float not in types and number == int(number) else number


def finite(value: Any) -> float | None:
    """A value as a finite number; None where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def same(one: Any, other: Any) -> bool:
    """Whether two values mean the same: 1 and 1.0 do, 1 and true do not."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def packed(value: Any) -> Scalar:
    """A value as Optuna holds it: a list as text, anything else as it is."""
    scalar: Scalar = json.dumps(value) if isinstance(value, list | tuple) else value
    return scalar


def unpacked(name: str, stored: Scalar) -> Value:
    """A field's value from Optuna's record."""
    if not (takes_lists(name) and isinstance(stored, str)):
        return stored
    try:
        value: Value = json.loads(stored)
    except ValueError:
        return stored  # text that a study file has where a list should be, refused with the other values
    return value
