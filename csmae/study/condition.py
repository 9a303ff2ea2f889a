"""Conditions under which a field is varied: what another field's value must be."""

from __future__ import annotations

import math
import operator
from functools import cached_property
from typing import Annotated, Any

from pydantic import Discriminator, RootModel, Tag, WithJsonSchema, field_validator

from csmae.study.values import as_field_value, takes_lists

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}

TAGS = ("comparison", "any_of", "equals")

ComparisonText = Annotated[str, WithJsonSchema({"type": "string", "pattern": r"^([<>=!]=|[<>])\s*([-+.\d]|inf)"})]
Plain = Annotated[Any, WithJsonSchema({"type": ["string", "boolean", "number", "null"], "pattern": "^(?![<>]|[=!]=)"})]


class Comparison(RootModel[ComparisonText], frozen=True):
    """The other field is a number that compares like this, such as ``"> 0"``; null never does."""

    @field_validator("root")
    @classmethod
    def _check(cls, text: str) -> str:
        number = text.lstrip("<>=!")
        try:
            is_number = not math.isnan(float(number))
        except ValueError:
            is_number = False
        if text.removesuffix(number) not in OPERATORS or not is_number:
            raise ValueError("must compare with a number, such as '> 0'")
        return text

    @cached_property
    def parts(self) -> tuple[str, float]:
        """The operator, such as ``>=``, and the number to compare with."""
        number = self.root.lstrip("<>=!")
        return self.root.removesuffix(number), float(number)


class AnyOf(RootModel[list[Any]], frozen=True):
    """The other field has one of these values."""


class Equals(RootModel[Plain], frozen=True):
    """The other field has this value."""


def _tag(value: Any) -> str:
    if isinstance(value, str) and value.startswith(tuple(OPERATORS)):
        return "comparison"
    return "any_of" if isinstance(value, list) else "equals"


Condition = Annotated[
    Annotated[Comparison, Tag("comparison")] | Annotated[AnyOf, Tag("any_of")] | Annotated[Equals, Tag("equals")],
    Discriminator(_tag),
]


def holds(condition: Condition, value: Any) -> bool:
    """Whether another field's value satisfies a condition."""
    if isinstance(condition, Comparison):
        sign, bound = condition.parts
        return value is not None and bool(OPERATORS[sign](float(value), bound))
    return bool(value in condition.root if isinstance(condition, AnyOf) else value == condition.root)


def named_values(condition: Condition) -> list[Any]:
    """The values that a condition names: those it wants, or the number it compares with."""
    if isinstance(condition, Comparison):
        return [condition.parts[1]]
    return condition.root if isinstance(condition, AnyOf) else [condition.root]


def describe(name: str, condition: Condition) -> str:
    """Write a condition on a field, such as ``loss.mim_weight > 0``."""
    if isinstance(condition, Comparison):
        sign, bound = condition.parts
        return f"{name} {sign} {repr(bound).removesuffix('.0')}"
    return f"{name} {'in' if isinstance(condition, AnyOf) else '=='} {condition.root}"


def as_condition(name: str, wanted: Any) -> Any:
    """Convert the values of a condition to those of the field; one list is one value if the field's values are lists."""
    wanted = as_field_value(name, wanted)
    is_one_list = isinstance(wanted, list) and takes_lists(name) and not any(isinstance(item, list) for item in wanted)
    return Equals(wanted) if is_one_list else wanted
