"""A trial is Optuna's ``FrozenTrial``; these functions read what this program stores with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.study.values import Value, decode_param
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import (
    ASSIGNMENTS,
    COMPLETED_EPOCHS,
    CONFIRMS,
    EPOCH_VALUES,
    GPU_S,
    INTERRUPTED,
    NOT_TRAINED,
    NUM_EPOCHS,
    PARENT,
    REASON,
    RESULT,
    SEED,
    STARTING_POINT,
    TRANSFERRED_FROM,
    VIOLATIONS,
    WORKER_S,
)

Values = tuple[float, ...]
"""One value per objective."""


def status_of(trial: FrozenTrial) -> TrialStatus:
    """How far a trial is, or how it ended. A confirmation that was trained to its last epoch is COMPLETE."""
    attributes = trial.user_attrs
    if TRANSFERRED_FROM in attributes:
        return TrialStatus.TRANSFERRED
    if trial.state is TrialState.WAITING and INTERRUPTED not in attributes:
        return TrialStatus.ENQUEUED
    if trial.state.is_finished() and NOT_TRAINED in attributes:
        return TrialStatus.REJECTED
    if trial.state is TrialState.RUNNING and paused_epoch(trial) is not None:
        return TrialStatus.PAUSED
    return TrialStatus(trial.state.name) if result_of(trial) is None else TrialStatus.COMPLETE


def is_cut_short(trial: FrozenTrial) -> bool:
    """Whether a budget ended the trial after its first score."""
    return status_of(trial) is TrialStatus.PRUNED and REASON in trial.user_attrs


def curve(trial: FrozenTrial) -> dict[int, Values]:
    """A trial's objectives by epoch."""
    several = {key: value for key, value in trial.user_attrs.items() if key.startswith(EPOCH_VALUES)}
    found = {int(key.removeprefix(EPOCH_VALUES)): tuple(values) for key, values in several.items()}
    return dict(sorted(found.items())) or {e: (value,) for e, value in sorted(trial.intermediate_values.items())}


def last_values(trial: FrozenTrial) -> Values:
    """A trial's objectives after its last epoch."""
    return tuple(trial.values or list(curve(trial).values())[-1])


def last_value(trial: FrozenTrial, objective: int = 0) -> float:
    """A trial's last value of one objective; NaN if it has no score."""
    return last_values(trial)[objective] if trial.values or curve(trial) else math.nan


def num_epochs(trial: FrozenTrial) -> int:
    """Epochs of a trial so far, those of its parent's training included."""
    started = int(assignments(trial)[-1]["from"]) if assignments(trial) else 0
    return max(
        int(trial.user_attrs.get(NUM_EPOCHS, 0)), max(curve(trial), default=0), started, paused_epoch(trial) or 0
    )


def assignment(start: int, until: int, reason: str) -> dict[str, Any]:
    """A piece of training as ``ASSIGNMENTS`` stores it.

    Args:
        start: Epochs that are trained before.
        until: Epoch after which the trial pauses, or ends if its training is complete.
        reason: Why the trial is proposed or resumed, for people.
    """
    assert until > start, f"an assignment trains at least one epoch: found {until} after {start}"
    return {"from": start, "until": until, "reason": reason}


def assignments(trial: FrozenTrial) -> list[dict[str, Any]]:
    """The pieces in which a trial was trained so far, see ``ASSIGNMENTS``."""
    found: list[dict[str, Any]] = trial.user_attrs.get(ASSIGNMENTS, [])
    return found


def paused_epoch(trial: FrozenTrial) -> int | None:
    """The epoch after which a trial paused; None if it did not, or was resumed since."""
    epoch: int | None = assignments(trial)[-1].get("paused") if assignments(trial) else None
    return epoch


def completed_epochs(trial: FrozenTrial) -> int:
    """``train.epochs`` when a trial that continues was complete, before it grew; 0 for any other trial."""
    continues = not trial.state.is_finished() or is_cut_short(trial)
    return int(trial.user_attrs.get(COMPLETED_EPOCHS, 0)) if continues else 0


def is_dropped(trial: FrozenTrial) -> bool:
    """Whether a paused trial's checkpoint was removed to save space."""
    return bool(assignments(trial)) and bool(assignments(trial)[-1].get("dropped"))


def num_restarts(trial: FrozenTrial) -> int:
    """How often a trial restarted from scratch, because its checkpoint had been removed."""
    return sum(bool(piece.get("dropped")) for piece in assignments(trial)[:-1])


def assigned_until(trial: FrozenTrial, epochs: int) -> int:
    """The epoch at which a trial's last assignment ends.

    Args:
        trial: One without assignments is trained to its end, such as an enqueued one.
        epochs: Epochs of its complete training, which may be more or fewer than when the trial was assigned.
    """
    pieces = assignments(trial)
    return min(int(pieces[-1]["until"]), epochs) if pieces else epochs


def used_seconds(trial: FrozenTrial) -> float:
    """Seconds of all the trial's GPUs, or of its workers; the wall time of an ended trial without recorded resources."""
    recorded = [float(trial.user_attrs[name]) for name in (GPU_S, WORKER_S) if name in trial.user_attrs]
    if recorded or trial.datetime_start is None or trial.datetime_complete is None:
        return sum(recorded)
    return (trial.datetime_complete - trial.datetime_start).total_seconds()


def params_of(trial: FrozenTrial) -> dict[str, Value]:
    """A trial's parameters as the study file writes them."""
    return {name: decode_param(name, trial.distributions[name], stored) for name, stored in trial.params.items()}


def param_of(trial: FrozenTrial, name: str) -> Value:
    """One of a trial's parameters; None if the trial lacks it."""
    return decode_param(name, trial.distributions[name], trial.params[name]) if name in trial.params else None


def trained_params(trial: FrozenTrial) -> dict[str, Value]:
    """A trial's parameters, and the seed if it is a confirmation."""
    return with_seed(trial, params_of(trial))


def constraint_violations(trial: FrozenTrial) -> dict[str, float]:
    """By how much a trial violates each constraint, or did when it paused last; at most 0 where it does not."""
    return {**trial.user_attrs.get(VIOLATIONS, {}), **trial.constraints}


def result_of(trial: FrozenTrial) -> Values | None:
    """Objectives of a trial that was trained to its last epoch, a confirmation or not; None for any other trial."""
    if trial.state is TrialState.COMPLETE:
        return tuple(trial.values)
    return tuple(trial.user_attrs[RESULT]) if RESULT in trial.user_attrs and trial.state.is_finished() else None


def confirmed_number(trial: optuna.Trial | FrozenTrial) -> int | None:
    """Number of the trial that a confirmation repeats with another seed; None for any other trial."""
    number: int | None = trial.user_attrs.get(CONFIRMS)
    return number


def parent_number(trial: optuna.Trial | FrozenTrial) -> int | None:
    """Number of the trial from whose checkpoint this one started; None for any other trial."""
    number: int | None = trial.user_attrs.get(PARENT)
    return number


def is_starting_point(trial: optuna.Trial | FrozenTrial) -> bool:
    """Whether a trial trains one of the study's starting points."""
    return STARTING_POINT in trial.user_attrs


def is_never_stopped(trial: optuna.Trial | FrozenTrial) -> bool:
    """Whether a trial is trained to its end whatever its scores: starting points and confirmations."""
    return is_starting_point(trial) or confirmed_number(trial) is not None


def with_seed(trial: optuna.Trial | FrozenTrial, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add a confirmation's seed to the values of a trial."""
    seed = {"train.seed": trial.user_attrs[SEED]} if SEED in trial.user_attrs else {}
    return {**values, **seed}
