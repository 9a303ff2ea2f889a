"""Values of configuration fields: as a study file writes them, as a field takes them, and as Optuna stores them."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Annotated, Any, get_args, get_origin

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from csmae.config import Config

Scalar = str | bool | int | float | None
"""A value that Optuna can store as a choice."""

Value = Scalar | list[Any]
"""A value of a field."""


def field_types(name: str) -> tuple[Any, ...]:
    """The types that a field takes, with those of its items; empty for an unknown field."""
    annotation = _annotation(name)
    return () if annotation is None else (annotation, *get_args(annotation))


def takes_lists(name: str) -> bool:
    """Whether a field's value is a list."""
    return get_origin(_annotation(name)) in (tuple, list)


def find_field(name: str) -> tuple[type[BaseModel], FieldInfo] | None:
    """Find a field of the configuration with the section that has it; None for an unknown name."""
    section: Any = Config
    *outer, last = name.split(".")
    for part in outer:
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field else None
    field = getattr(section, "model_fields", {}).get(last)
    return (section, field) if field else None


def _annotation(name: str) -> Any:
    found = find_field(name)
    return found[1].annotation if found else None


def as_field_value(name: str, value: Any) -> Any:
    """Convert a value to what the field takes: text to a number (YAML reads ``1e-3`` as text), a tuple to a list."""
    if isinstance(value, list | tuple):
        return [as_field_value(name, item) for item in value]
    types = field_types(name)
    if not isinstance(value, str) or str in types or not (float in types or int in types):
        return value
    number = finite_number(value)
    if number is None:
        return value
    return int(number) if float not in types and number == int(number) else number


def finite_number(value: Any) -> float | None:
    """Convert a value to a finite number; None if it is not one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _number(value: Any) -> float:
    """Convert a value to a number; YAML reads 1e-5 as text."""
    number = finite_number(value)
    if number is None:
        raise ValueError("takes numbers")
    return number


def _whole_number(value: Any) -> int:
    number = finite_number(value)
    if number is None or not number.is_integer():
        raise ValueError("takes whole numbers")
    return int(number)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


Number = Annotated[float, BeforeValidator(_number)]
WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
Boolean = Annotated[bool, BeforeValidator(_boolean)]


def means_same(one: Any, other: Any) -> bool:
    """Whether two values mean the same: 1 and 1.0 do, 1 and true do not."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(means_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def encode_value(value: Any) -> Scalar:
    """Convert a value to what Optuna stores: a list to text."""
    scalar: Scalar = json.dumps(value) if isinstance(value, list | tuple) else value
    return scalar


def decode_param(name: str, distribution: BaseDistribution, stored: Any) -> Value:
    """Convert a parameter that Optuna stored: a list as text, a sum of steps with its rounding error."""
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return decode_value(name, stored)
    number = float(stored)
    if isinstance(distribution, IntDistribution):
        return round(number)
    if distribution.step is None:
        return number
    low, step = Decimal(repr(distribution.low)), Decimal(repr(distribution.step))
    steps = round((number - distribution.low) / distribution.step)
    return min(distribution.high, float(low + steps * step))


def decode_value(name: str, stored: Scalar) -> Value:
    """Convert a choice that Optuna stored."""
    if not (takes_lists(name) and isinstance(stored, str)):
        return stored
    try:
        value: Value = json.loads(stored)
    except ValueError:
        return stored  # text that a study file has in place of a list: the configuration rejects it
    return value
