"""A study whose ``train.epochs`` has become larger: its trials continue under their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.config import with_defaults
from csmae.study.study import Study
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import (
    ASSIGNMENTS,
    BASE,
    CHAMPION,
    COMPLETED_EPOCHS,
    DEFINITION,
    FINALISTS,
    INTERRUPTED,
    REASON,
    RESULT,
    VIOLATIONS,
)
from csmae.trials.leaderboard import leaderboard
from csmae.trials.optuna_private import TrialChange, change_trials
from csmae.trials.trial import assignments, completed_epochs, confirmed_number, num_epochs, status_of

EPOCHS = "train.epochs"


def shorter_epochs(definition: Mapping[str, Any], study: Study) -> int | None:
    """Return ``train.epochs`` of a stored definition if the study file has more.

    Returns:
        None if it does not, or if the space varies the length of the training.
    """
    before = _fixed_epochs(definition, study)
    return before if before and before < study.space.base[EPOCHS] else None


def describe_shrinking(definition: Mapping[str, Any], study: Study, trained: Sequence[FrozenTrial]) -> str | None:
    """Say that ``train.epochs`` cannot become smaller in a study with trained trials; None if it does not."""
    before, now = _fixed_epochs(definition, study), study.space.base[EPOCHS]
    if before is None or before <= now:
        return None
    longest = max(trained, key=num_epochs)
    reason = f"is less than the {num_epochs(longest)} epochs that trial {longest.number} trained"
    if num_epochs(longest) <= now:
        reason = f"is less than {before}, with which trial {longest.number} was trained"
    return f"{EPOCHS} {now} {reason}: set it to {before} or more, or use --name NEW to start another study"


def _fixed_epochs(definition: Mapping[str, Any], study: Study) -> int | None:
    """``train.epochs`` of a stored definition; None if its space or the study's varies it."""
    varies = EPOCHS in study.space.domains or EPOCHS in definition["space"]
    return None if varies else int(with_defaults(definition["base"])["train"]["epochs"])


def lengthen(storage: optuna.storages.RDBStorage, opened: optuna.Study, study: Study, before: int) -> None:
    """Let the trials of a study continue to its larger ``train.epochs``, in one transaction.

    Complete trials are paused after their last epoch, with their curves. Confirmations have repeated shorter trainings, so they
    no longer count, and there are no finalists. The champion stays recorded until the search names another one.

    Args:
        storage: The database.
        opened: The study in it; it must be loaded again.
        study: The study file with the larger value.
        before: The smaller value.
    """
    changes = [change for trial in opened.get_trials(deepcopy=False) for change in _changes(trial, before)]
    attributes = {BASE: dict(study.base), DEFINITION: study.definition(), FINALISTS: []}
    change_trials(storage, opened, changes, attributes)


def _changes(trial: FrozenTrial, before: int) -> Iterator[TrialChange]:
    status = status_of(trial)
    if confirmed_number(trial) is not None:
        if status in (TrialStatus.COMPLETE, TrialStatus.RUNNING, TrialStatus.PAUSED, TrialStatus.WAITING):
            reason = {REASON: f"{EPOCHS} was {before}"}
            yield TrialChange(trial, TrialState.PRUNED, reason, removed=(RESULT, INTERRUPTED))
    elif status is TrialStatus.COMPLETE:
        *earlier, last = assignments(trial) or [{"from": 0, "until": before, "reason": "complete training"}]
        paused = {ASSIGNMENTS: [*earlier, {**last, "paused": before}], COMPLETED_EPOCHS: before}
        yield TrialChange(trial, TrialState.RUNNING, {**paused, VIOLATIONS: trial.constraints})
    elif trial.state is TrialState.COMPLETE:  # transferred from a study whose trials were as short
        yield TrialChange(trial, TrialState.PRUNED, {})


def former_champion(study: optuna.Study) -> int | None:
    """Number of the champion of the shorter trainings, as long as no trial is complete since; None if there is none."""
    champion, entries = study.user_attrs.get(CHAMPION), leaderboard(study).entries
    return int(champion["trial"]) if champion and entries and completed_epochs(entries[0].trial) else None
