"""What a search tells those who watch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins, or goes on after an interruption."""

    number: int
    values: Mapping[str, Any]
    epochs: int
    """Epochs that the trial will have at its end."""
    resumed: bool


@dataclass(frozen=True)
class EpochReported:
    """A trial has done an epoch."""

    number: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrialWaiting:
    """A trial goes on, or begins, when there is room."""

    number: int
    reason: str


@dataclass(frozen=True)
class TrialEnded:
    """A trial is over."""

    number: int
    state: str
    """COMPLETE, PRUNED or FAIL."""
    value: float | None
    """The objective at the end."""
    reason: str | None = None
    """Why it failed, or was cut short."""
    repeats: int | None = None
    """The trial that it repeats with another seed."""
    broken: tuple[str, ...] = ()
    """Constraints that it breaks."""


@dataclass(frozen=True)
class SearchEnd:
    """How a search ended, and in words why where it was not by having done all."""

    kind: Literal["done", "interrupted", "stuck", "superseded", "budget", "hopeless"]
    """After an interruption, and where the search is stuck (a full disk), the running trials can be gone on with. Where another
    driver took the storage over, they are that driver's."""
    reason: str = ""


Event = TrialStarted | EpochReported | TrialWaiting | TrialEnded

Listener = Callable[[Event], None]
