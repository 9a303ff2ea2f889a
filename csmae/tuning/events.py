"""Events that a search reports to its listeners, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any

from csmae.trial_status import TrialStatus


@dataclass(frozen=True)
class TrialStarted:
    """A trial starts, or resumes after an interruption or a pause."""

    number: int
    values: Mapping[str, Any]
    epochs: int
    """Epochs of the complete training."""
    resumed: bool
    promoted: bool
    """Whether it continues after a pause."""
    until: int
    """Epoch after which it pauses, or ends if its training is complete."""
    reason: str
    """Why it was proposed or resumed."""


@dataclass(frozen=True)
class EpochReported:
    """A trial has completed an epoch."""

    number: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrialWaiting:
    """A trial waits: for resources, or for the study to resume after its budget was exhausted."""

    number: int
    reason: str


@dataclass(frozen=True)
class TrialPaused:
    """A trial has paused after an epoch, with its checkpoint saved; the strategy may resume it, which starts it again."""

    number: int
    epoch: int
    reason: str
    """Why it was trained to this epoch and no further."""


@dataclass(frozen=True)
class TrialEnded:
    """A trial has ended."""

    number: int
    status: TrialStatus
    """COMPLETE, PRUNED or FAIL."""
    value: float | None
    """The last value of the first objective."""
    reason: str | None = None
    """Why the trial failed, was cut short, or was stopped while it was paused."""
    confirms: int | None = None
    """For a confirmation, the number of the trial that it repeats with another seed."""
    violated_constraints: tuple[str, ...] = ()
    """Names of the metrics whose constraint the trial violates."""


class SearchOutcome(StrEnum):
    """How a search ended, and what becomes of the trials that were running."""

    COMPLETED = auto()
    """All trials have ended, or the space has no further point to train. No trial was running."""
    INTERRUPTED = auto()
    """A signal stopped the search. Running trials stay RUNNING; the next run resumes them."""
    STORAGE_FAILED = auto()
    """The database or a trial's files cannot be written. Running trials stay RUNNING; the next run resumes them."""
    SUPERSEDED = auto()
    """Another driver took over the storage, and with it the running trials."""
    BUDGET_EXHAUSTED = auto()
    """The time limit or the GPU-hours are used up. Running trials are cut short: those with a score are PRUNED, or paused
    if the strategy resumes paused trials; the others wait until the study resumes."""
    ABORTED = auto()
    """The search cannot succeed. Running trials are cut short, as with an exhausted budget.

    Whatever the outcome, paused trials stay paused.
    """


@dataclass(frozen=True)
class SearchEnd:
    """How and why a search ended."""

    outcome: SearchOutcome
    reason: str = ""
    """Empty if the study is complete or a signal stopped the search."""


SearchEvent = TrialStarted | EpochReported | TrialWaiting | TrialPaused | TrialEnded

Listener = Callable[[SearchEvent], None]
