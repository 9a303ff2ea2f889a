"""What a worker group's processes tell each other through their coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["finished", "failed", "stuck", "roomless"]
"""Failed is for good. The others can go on later: stuck for a reason outside the trial, such as a full disk, and roomless
where a cluster has no place for its workers."""


@dataclass(frozen=True)
class Assignment:
    """A trial that a group of workers shall train."""

    ticket: int
    """Counts a mailbox's assignments from 1."""
    config: dict[str, Any]
    run_dir: str
    micro_batch: int | None = None
    """The micro-batch that a rank whose memory was too small asked for, if any did."""


@dataclass(frozen=True)
class EpochReport:
    """The workers did an epoch and wait for the verdict."""

    number: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class ResourcesHeld:
    """Whether the trial's workers hold resources, or wait for them; the first event of each assignment."""

    resources: bool


@dataclass(frozen=True)
class AssignmentDone:
    """The workers are done with the assignment."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class GroupLost:
    """There are no workers any more and none will come."""

    fit: int
    """Which of the slot's fits ended."""
    reason: str = ""
    """Empty where they left of their own accord, with their work saved."""
    unschedulable: bool = False
    """Whether there was no place for them."""


@dataclass(frozen=True)
class HeartbeatTimeout:
    """The workers gave no sign of life for too long, at the assignment or before they took it."""

    workers: list[Any]
    """Their actors."""


Event = EpochReport | ResourcesHeld | AssignmentDone | GroupLost | HeartbeatTimeout
