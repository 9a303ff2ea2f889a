"""What a strategy sees of a study, read from the trial store."""

from __future__ import annotations

from collections.abc import Mapping

from optuna.trial import FrozenTrial

from csmae.config import ConfigError
from csmae.model.cost import cost
from csmae.study.study import Study
from csmae.study.values import Value
from csmae.trial_status import TrialStatus
from csmae.trials.pareto import as_scores
from csmae.trials.store import TrialStore
from csmae.trials.trial import (
    assigned_until,
    confirmed_number,
    constraint_violations,
    curve,
    is_starting_point,
    num_epochs,
    params_of,
    parent_number,
    result_of,
    status_of,
)
from csmae.tuning.strategy.base import Scores, TrialView


class Observations:
    """The trials of a study as a strategy sees them. Lives in the driver.

    They are a function of the trial store alone, so a restarted search sees what an uninterrupted one does.

    Args:
        trial_store: Of the study.
    """

    def __init__(self, trial_store: TrialStore) -> None:
        self._trial_store = trial_store
        self._base_flops = cost(trial_store.study.resolve({})).flops
        self._seen: dict[int, tuple[FrozenTrial, TrialView | None]] = {}
        """By number, what was made of which stored trial; the trial store returns unchanged trials as the same objects."""
        self._views: tuple[TrialView, ...] = ()

    def views(self) -> tuple[TrialView, ...]:
        """All trials without confirmations, in the order of their numbers; the same tuple as long as nothing changes."""
        changed = False
        for trial in self._trial_store.all_trials():
            stored, before = self._seen.get(trial.number, (None, None))
            if stored is not trial:
                view = self._view(trial, before) if _is_visible(trial) else None
                self._seen[trial.number], changed = (trial, view), changed or view != before
        if changed:
            self._views = tuple(view for _, view in self._seen.values() if view)
        return self._views

    def _view(self, trial: FrozenTrial, before: TrialView | None) -> TrialView:
        study, point, status = self._trial_store.study, params_of(trial), status_of(trial)
        if before and before.point == point:
            epochs, epoch_cost = before.epochs, before.epoch_cost
        else:
            epochs, epoch_cost = _length(study, point, self._base_flops)
        scores = _scores(trial, study, epochs)
        trained = max(num_epochs(trial), max(scores, default=0))
        return TrialView(
            number=trial.number,
            point=point,
            status=TrialStatus.RUNNING if status is TrialStatus.WAITING else status,  # it trains before others do
            epochs=epochs,
            trained=trained,
            until=trained if status is TrialStatus.TRANSFERRED else assigned_until(trial, epochs),
            scores=scores,
            epoch_cost=epoch_cost,
            violation=sum(max(0.0, over) for over in constraint_violations(trial).values()),
            never_stop=is_starting_point(trial),
            parent=parent_number(trial),
        )


def _is_visible(trial: FrozenTrial) -> bool:
    invisible = (TrialStatus.ENQUEUED, TrialStatus.REJECTED)
    return confirmed_number(trial) is None and status_of(trial) not in invisible


def _length(study: Study, point: Mapping[str, Value], base_flops: int) -> tuple[int, float]:
    """Epochs of a configuration's complete training, and the cost of one in relation to the base's."""
    try:
        config = study.resolve(point)
    except ConfigError:  # the search's present settings do not allow the configuration
        return study.max_epochs, 1.0
    return config.train.epochs, cost(config).flops / base_flops


def _scores(trial: FrozenTrial, study: Study, epochs: int) -> dict[int, Scores]:
    """Scores by epoch; a result without a curve is that of the last epoch."""
    values, result = curve(trial), result_of(trial)
    if result is not None:
        values.setdefault(epochs, result)
    return {epoch: as_scores(values[epoch], study.search.signs) for epoch in sorted(values)}
