"""How far a trial is, or how it ended."""

from __future__ import annotations

from enum import StrEnum


class TrialStatus(StrEnum):
    """Status of a trial. COMPLETE, PRUNED, FAIL, RUNNING and WAITING have the names of Optuna's states."""

    COMPLETE = "COMPLETE"
    """Trained to its last epoch."""
    PRUNED = "PRUNED"
    """Stopped early by the strategy, or cut short by a budget after its first score."""
    FAIL = "FAIL"
    """Ended without a result."""
    RUNNING = "RUNNING"
    """In training, or interrupted in the middle of it when its search stopped."""
    PAUSED = "PAUSED"
    """Paused after an epoch by the strategy; it can resume from its checkpoint. Optuna lists it as RUNNING."""
    WAITING = "WAITING"
    """Cut short by a budget before its first score; resumes with the study."""
    ENQUEUED = "ENQUEUED"
    """Enqueued and not started."""
    REJECTED = "REJECTED"
    """Ended without training, for example because its configuration was trained before."""
    TRANSFERRED = "TRANSFERRED"
    """Copied from another study, which trained it."""

    @property
    def is_trained(self) -> bool:
        """Whether its study trains or trained it."""
        return self not in (TrialStatus.ENQUEUED, TrialStatus.REJECTED, TrialStatus.TRANSFERRED)


STATUS_NAMES = {
    TrialStatus.COMPLETE: "completed",
    TrialStatus.PRUNED: "pruned",
    TrialStatus.FAIL: "failed",
    TrialStatus.RUNNING: "running",
    TrialStatus.PAUSED: "paused",
    TrialStatus.WAITING: "waiting",
}
"""What users see for the status of a trial, in the order of columns and lists."""
