"""Domains: the values that a field takes in a search, and the conditions under which it is varied."""

from __future__ import annotations

import json
import math
from functools import cached_property
from itertools import combinations
from typing import Annotated, Any, Self

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from csmae.config import ConfigError, one_line
from csmae.settings import Names, error_lines
from csmae.study import condition
from csmae.study.condition import Condition, as_condition
from csmae.study.prior import Prior
from csmae.study.values import (
    Boolean,
    Number,
    Scalar,
    Value,
    WholeNumber,
    as_field_value,
    decode_param,
    encode_value,
    field_types,
    finite_number,
    means_same,
)

STEP_TOLERANCE = 1e-8
"""Rounding error, in steps, up to which a value belongs to a stepped range; as in Optuna."""


def _pair(value: Any) -> Any:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("must be [low, high]")
    return value


class _Domain(BaseModel):
    """The values of one field. Validation takes the field's dotted name as its context."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    when: dict[str, Condition] = Field({}, json_schema_extra={"type": ["object", "null"]})
    """What other fields must be; if they are not, this field keeps the value of ``base``."""
    prior: Prior | None = None
    """The value that an expert expects to be best; configurations near it are tried first, but not only those."""

    _name: str = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Keep the field's name."""
        self._name = context

    @field_validator("when", mode="before")
    @classmethod
    def _convert_conditions(cls, conditions: Any) -> Any:
        if not conditions:
            return {}
        if not isinstance(conditions, dict):
            raise ValueError("must map fields to what they must be, such as {loss.mim_weight: '> 0'}")
        return {str(name): as_condition(str(name), wanted) for name, wanted in conditions.items()}

    @field_validator("prior", mode="before")
    @classmethod
    def _convert_prior(cls, prior: Any, info: ValidationInfo) -> Any:
        if prior is not None and not isinstance(prior, dict):
            raise ValueError("must be {center: value, confidence: low, medium or high}")
        name = str(info.context)
        return prior and {
            key: as_field_value(name, value) if key == "center" else value for key, value in prior.items()
        }

    @property
    def name(self) -> str:
        """Dotted name of the field."""
        return self._name

    @cached_property
    def distribution(self) -> FloatDistribution | IntDistribution | CategoricalDistribution:
        """The domain as Optuna knows it."""
        raise NotImplementedError

    @property
    def conditions(self) -> str:
        """The conditions as text."""
        return " and ".join(condition.describe(name, wanted) for name, wanted in self.when.items())

    @property
    def ends(self) -> list[Value]:
        """Both ends of a range, or every choice."""
        domain = self.distribution
        stored = domain.choices if isinstance(domain, CategoricalDistribution) else (domain.low, domain.high)
        return [self.decode(value) for value in stored]

    @property
    def values(self) -> list[Value]:
        """All values of a domain of finite size."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return self.ends
        assert domain.step is not None
        return [self.decode(domain.low + index * domain.step) for index in range(int(self.size))]

    @property
    def size(self) -> float:
        """Number of values; infinite for a float without step."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return len(domain.choices)
        return math.inf if domain.step is None else round((domain.high - domain.low) / domain.step) + 1

    def __contains__(self, value: Any) -> bool:
        try:
            self.fit(value)
        except ValueError:
            return False
        return True

    def fit(self, value: Any) -> Value:
        """Convert a value to the domain's own: ``"1e-3"`` to 0.001, and a stepped value to one with the step's digits.

        Raises:
            ValueError: The value is outside the domain.
        """
        value, domain = as_field_value(self.name, value), self.distribution
        if isinstance(domain, CategoricalDistribution):
            for choice in self.ends:
                if means_same(choice, value):
                    return choice
        elif (number := finite_number(value)) is not None and domain.low <= number <= domain.high:
            steps = (number - domain.low) / domain.step if domain.step else 0.0
            if abs(steps - round(steps)) < STEP_TOLERANCE:
                return self.decode(number)
        raise ValueError(f"{self.name} {value} is outside its domain: {self}")

    def decode(self, stored: Any) -> Value:
        """Convert a value that Optuna stored."""
        return decode_param(self.name, self.distribution, stored)

    def suggest(self, trial: optuna.Trial) -> Value:
        """Draw a value with the study's sampler."""
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            return self.decode(trial.suggest_categorical(self.name, domain.choices))
        if isinstance(domain, IntDistribution):
            return trial.suggest_int(self.name, domain.low, domain.high, step=domain.step, log=domain.log)
        return self.decode(trial.suggest_float(self.name, domain.low, domain.high, step=domain.step, log=domain.log))

    def __str__(self) -> str:
        domain = self.distribution
        if isinstance(domain, CategoricalDistribution):
            text = f"one of {', '.join(map(json.dumps, self.ends))}"
        else:
            kind, unstepped = ("int", 1) if isinstance(domain, IntDistribution) else ("float", None)
            step = "" if domain.step == unstepped else f", step {_short(domain.step)}"
            text = f"{kind} {_short(domain.low)} to {_short(domain.high)}{', log' if domain.log else ''}{step}"
        return text + (f", when {self.conditions}" if self.when else "")


class ChoiceDomain(_Domain):
    """One of several values."""

    choice: list[Value] = Field(min_length=1)
    """Numbers, words, true, false, null, or lists of them."""

    @field_validator("choice", mode="before")
    @classmethod
    def _convert_choices(cls, choices: Any, info: ValidationInfo) -> Any:
        if not isinstance(choices, list) or not choices:
            raise ValueError("must list at least one value")
        choices = as_field_value(str(info.context), choices)
        items = (item for choice in choices for item in (choice if isinstance(choice, list) else [choice]))
        if not all(isinstance(item, Scalar) for item in items):
            raise ValueError("must list numbers, words, true, false or null, or lists of them")
        pairs = combinations(choices, 2)
        if any(means_same(one, other) or means_same(encode_value(one), encode_value(other)) for one, other in pairs):
            raise ValueError("names a value twice")
        return choices

    @cached_property
    def distribution(self) -> CategoricalDistribution:
        """The domain as Optuna knows it."""
        return CategoricalDistribution([encode_value(choice) for choice in self.choice])


class _Range(_Domain):
    """What both kinds of ranges have in common."""

    bounds: tuple[float, float]
    log: Boolean = False
    """Draw the value on a logarithmic scale."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.bounds[0] < self.bounds[1]:
            raise ConfigError(f"low must be smaller than high, found [{', '.join(map(_short, self.bounds))}]")
        try:
            _ = self.distribution  # Optuna checks the options together
        except ValueError as error:
            raise ConfigError(one_line(error, None)) from None
        return self


class FloatDomain(_Range):
    """A range of numbers."""

    bounds: Annotated[tuple[Number, Number], BeforeValidator(_pair)] = Field(alias="float")
    """[low, high]; both belong to the range."""
    step: Number | None = None
    """Distance between the values; null is a continuous range."""

    @model_validator(mode="after")
    def _check_field(self) -> Self:
        if float not in field_types(self.name):
            raise ConfigError("takes no fractions: use int: [low, high] or choice: [...]")
        return self

    @cached_property
    def distribution(self) -> FloatDistribution:
        """The domain as Optuna knows it."""
        return FloatDistribution(*self.bounds, self.log, self.step)


class IntDomain(_Range):
    """A range of whole numbers."""

    bounds: Annotated[tuple[WholeNumber, WholeNumber], BeforeValidator(_pair)] = Field(alias="int")
    """[low, high]; both belong to the range."""
    step: WholeNumber | None = 1
    """Distance between the values; null is 1."""

    @cached_property
    def distribution(self) -> IntDistribution:
        """The domain as Optuna knows it."""
        return IntDistribution(*self.bounds, self.log, 1 if self.step is None else self.step)


def _short(value: float | None) -> str:
    """Write a number with all of its digits, and no more."""
    return repr(value).removesuffix(".0")


DOMAINS: dict[str, type[_Domain]] = {"float": FloatDomain, "int": IntDomain, "choice": ChoiceDomain}
"""By the key of which an entry of the space has exactly one."""


def _kind(entry: Any) -> str | None:
    kinds = [kind for kind in DOMAINS if kind in entry] if isinstance(entry, dict) else []
    return kinds[0] if len(kinds) == 1 else None


Domain = Annotated[
    Annotated[FloatDomain, Tag("float")] | Annotated[IntDomain, Tag("int")] | Annotated[ChoiceDomain, Tag("choice")],
    Discriminator(
        _kind,
        custom_error_type="domain",
        custom_error_message="must be {float: [low, high]}, {int: [low, high]} or {choice: [...]}",
    ),
]

ADAPTER: TypeAdapter[Domain] = TypeAdapter(Domain)


def parse_domain(name: str, entry: Any) -> Domain:
    """Read an entry of the space, such as ``{float: [1e-5, 1e-3], log: true}``.

    Args:
        name: Dotted name of the field.
        entry: The entry in the study file.

    Raises:
        ConfigError: The entry is not a domain, the field cannot take it, or its prior is outside of it; one line per mistake.
    """
    try:
        domain = ADAPTER.validate_python(entry, context=name)
    except ValidationError as error:
        kind = _kind(entry) or "float"
        known = [field.alias or option for option, field in DOMAINS[kind].model_fields.items()]
        known += [f"prior.{option}" for option in Prior.model_fields]
        items = [{**i, "loc": [part for part in i["loc"][1:] if part not in condition.TAGS]} for i in error.errors()]
        raise ConfigError("\n".join(error_lines(items, Names(f"an option of {kind}", known)))) from None
    if domain.prior and domain.prior.center not in domain:
        raise ConfigError(f"prior.center {json.dumps(domain.prior.center)} is outside the domain: {domain}")
    return domain
