"""What a strategy sees of a study, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from csmae.study.values import Value
from csmae.trial_status import TrialStatus

Scores = tuple[float, ...]
"""One score per objective, larger is better."""


@dataclass(frozen=True)
class TrialView:
    """What a strategy knows of a trial."""

    number: int
    point: Mapping[str, Value]
    """Values of the active domains, by dotted name."""
    status: TrialStatus
    """RUNNING, PAUSED, COMPLETE, PRUNED, FAIL or TRANSFERRED."""
    epochs: int
    """Epochs of the complete training."""
    trained: int = 0
    """Epochs trained so far, with or without a score."""
    until: int = 0
    """Epoch at which the current or last assignment ends."""
    scores: Mapping[int, Scores] = field(default_factory=dict)
    """Finite scores by epoch, in ascending order of the epochs."""
    epoch_cost: float = 1.0
    """Cost of an epoch in relation to that of the base configuration."""
    violation: float = 0.0
    """Sum of the amounts by which the constraints are violated; 0 if none is."""
    never_stop: bool = False
    """Whether the trial is a starting point, which is always trained to its end."""
    parent: int | None = None
    """Number of the trial from whose checkpoint this one started."""


@dataclass(frozen=True)
class NewTrial:
    """Train a new configuration."""

    until: int
    """Epoch after which the trial pauses, or ends if the training is complete; capped at its length."""
    reason: str
    """Why, for people: ``first rung of 3 epochs``."""
    points: Iterator[Mapping[str, Value]] | None = None
    """Points to try, best first; the first that can be trained is taken. None lets the study's sampler propose."""
    parent: int | None = None
    """Number of the trial whose checkpoint the new one copies; it continues at the parent's epoch."""


@dataclass(frozen=True)
class Resume:
    """Continue a paused trial."""

    number: int
    until: int
    """Epoch after which the trial pauses, or ends if the training is complete."""
    reason: str
    """Why, for people: ``best of 9 trials at epoch 3``."""


@dataclass(frozen=True)
class Stop:
    """End a paused trial for good; its checkpoint is no longer needed."""

    number: int
    reason: str


Decision = NewTrial | Resume | Stop


class Strategy(Protocol):
    """Decides what is trained next. Its decisions are a function of the trials and the search's seed.

    A restarted search therefore decides as an uninterrupted one. Instances may cache what they compute from the trials.
    """

    def next(self, trials: Sequence[TrialView], num_new: int) -> Decision | None:
        """Decide what to train next.

        Args:
            trials: All trials of the study without confirmations, in the order of their numbers.
            num_new: How many further new configurations the study may train.

        Returns:
            The decision. None if there is nothing to do until a running trial reports; if none runs, the exploration is over.
        """

    def should_continue(self, number: int, epoch: int, scores: Scores) -> bool:
        """Record a trial's scores after an epoch and return whether it continues. Repeating it repeats the decision.

        Called for every epoch with finite scores, including those of the trial store when a search starts.
        """

    def expectation(self, trials: Sequence[TrialView]) -> Mapping[int, float]:
        """How likely each paused trial is to be resumed, by number; larger is likelier. Only the order counts."""

    def describe(self) -> list[str]:
        """Explain the strategy in sentences for this space and budget, for ``--dry-run``."""
