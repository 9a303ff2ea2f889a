"""What a trial in the store says of itself: its curve, its result, and whether it can win."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.trials.attributes import (
    CUT,
    EPOCH,
    NOT_TRAINED,
    RESULT,
)
from csmae.trials.pareto import on_pareto_front, order

Values = tuple[float, ...]


def curve(trial: FrozenTrial) -> dict[int, Values]:
    """A trial's objectives by epoch."""
    several = {key: value for key, value in trial.user_attrs.items() if key.startswith(EPOCH)}
    found = {int(key.removeprefix(EPOCH)): tuple(values) for key, values in several.items()}
    return dict(sorted(found.items())) or {e: (value,) for e, value in sorted(trial.intermediate_values.items())}


def last_values(trial: FrozenTrial) -> Values:
    """A trial's objectives after its last epoch."""
    return tuple(trial.values or list(curve(trial).values())[-1])


def result_of(trial: FrozenTrial) -> Values | None:
    """Objectives of a trial that was trained to its end, a repetition or not; None for another."""
    if trial.state is TrialState.COMPLETE:
        return tuple(trial.values)
    return tuple(trial.user_attrs[RESULT]) if RESULT in trial.user_attrs and trial.state.is_finished() else None


def state_of(trial: FrozenTrial) -> str:
    """How a trial stands or ended: Optuna's word, but COMPLETE for a repetition that was trained to its end."""
    return trial.state.name if result_of(trial) is None else TrialState.COMPLETE.name


def ranked(trials: Iterable[FrozenTrial], signs: Sequence[int]) -> list[FrozenTrial]:
    """Those that may win by their own scores, best first; by Pareto front for several objectives.

    Args:
        trials: Without repetitions.
        signs: For each objective, 1 where larger is better, else -1.
    """
    kept = eligible(trials)
    return [kept[index] for index in order([_scores(trial, signs) for trial in kept])]


def front(trials: Iterable[FrozenTrial], signs: Sequence[int]) -> list[FrozenTrial]:
    """Those of the ranked trials that no other one beats in every objective; arguments as of ``ranked``."""
    kept = eligible(trials)
    first = on_pareto_front([_scores(trial, signs) for trial in kept])
    return [trial for trial, on_front in zip(kept, first, strict=True) if on_front]


def _scores(trial: FrozenTrial, signs: Sequence[int]) -> Values:
    return tuple(sign * value for sign, value in zip(signs, last_values(trial), strict=True))


def eligible(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those that came to their end and keep to the constraints; if there is none, those that the budget cut short."""
    kept = [trial for trial in trials if max(trial.constraints.values(), default=0) <= 0]
    return [t for t in kept if t.state is TrialState.COMPLETE] or [t for t in kept if was_cut_short(t)]


def was_started(trial: FrozenTrial) -> bool:
    """Whether a trial runs, is over, or waits because a budget cut it; not one that is only enqueued."""
    return trial.state is not TrialState.WAITING or CUT in trial.user_attrs


def waits(trial: FrozenTrial) -> bool:
    """Whether a trial waits because a budget cut it."""
    return trial.state is TrialState.WAITING and CUT in trial.user_attrs


def was_cut_short(trial: FrozenTrial) -> bool:
    """Whether the budget cut a trial short, after an epoch at least."""
    stopped = trial.state is TrialState.PRUNED and "reason" in trial.user_attrs
    return stopped and not {NOT_TRAINED, RESULT} & trial.user_attrs.keys()


def with_seed(trial: optuna.Trial | FrozenTrial, values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values, with the seed that a repetition has of its own."""
    seed = {"train.seed": trial.user_attrs["seed"]} if "seed" in trial.user_attrs else {}
    return {**values, **seed}
