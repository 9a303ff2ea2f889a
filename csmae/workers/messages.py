"""Messages that the processes of a worker group send each other through the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How an assignment ended."""

    FINISHED = "finished"
    """All epochs are trained."""
    PAUSED = "paused"
    """The last epoch of the assignment is trained, and its checkpoint is stored; the trial can resume in any group."""
    FAILED = "failed"
    """The trial failed permanently."""
    STORAGE_FAILED = "storage_failed"
    """The storage cannot be written, such as a full disk; a later search can resume the trial."""
    UNSCHEDULABLE = "unschedulable"
    """No node has the workers' resources; the trial can resume when one has."""


@dataclass(frozen=True)
class Assignment:
    """A trial for the train workers."""

    id: int
    """Number of the assignment in this worker group, from 1."""
    config: dict[str, Any]
    run_dir: str
    until: int
    """Last epoch to train; the trial pauses there if it is not the last one of the training."""
    parent_dir: str | None = None
    """Folder of another trial, whose checkpoint this one copies if it has none."""
    micro_batch: int | None = None
    """Smaller micro-batch that a rank requested when it was out of memory."""

    @property
    def outcome(self) -> Outcome:
        """How the assignment ends once all its epochs are trained."""
        return Outcome.PAUSED if self.until < self.config["train"]["epochs"] else Outcome.FINISHED


@dataclass(frozen=True)
class EpochReport:
    """The workers trained an epoch and wait for the decision whether to continue."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class ResourcesHeld:
    """Whether the workers hold resources or wait for them; the first event of each assignment."""

    held: bool


@dataclass(frozen=True)
class AssignmentEnded:
    """The workers no longer train the assignment."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class FitEnded:
    """A ``fit()`` of Ray Train ended by itself: it has no workers and starts no more."""

    number: int
    """Number of the ``fit()`` in this worker group, from 1."""
    reason: str = ""
    """Empty where the workers exited as expected, with their work saved."""
    unschedulable: bool = False
    """Whether no node had the workers' resources."""


@dataclass(frozen=True)
class HeartbeatTimeout:
    """Workers sent no heartbeat for too long, while they trained the assignment or before they took it."""

    workers: list[Any]
    """Their actors."""


CoordinatorEvent = EpochReport | ResourcesHeld | AssignmentEnded | FitEnded | HeartbeatTimeout
"""What the coordinator returns to the Tune trainable."""
