"""When a study proposes no further configurations although it may: ``search.stop_when``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.study.options import Search
from csmae.study.study import Study
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import IMPROVEMENT
from csmae.trials.leaderboard import leaderboard, violated_constraints
from csmae.trials.pareto import on_pareto_front
from csmae.trials.store import TrialStore
from csmae.trials.trial import assignments, status_of
from csmae.tuning.race import seed_variance
from csmae.tuning.samplers import num_complete
from csmae.tuning.strategy.base import Scores, TrialView

MIN_COMPLETE = 20
"""Trials trained to their end that the terminator needs; Optuna's default."""

DEFAULT_ERROR = 0.01
"""Error of a score over seeds, as a share of the best score, as long as no confirmation has measured it."""


class StopWhen:
    """Finds out whether a study must propose no further configurations. Lives in the driver.

    Trials that run or are paused are trained on as the strategy wants. If one of them improves on the best, new configurations
    are proposed again. Decisions are a function of the trial store.

    Args:
        trial_store: Of the study.
    """

    def __init__(self, trial_store: TrialStore) -> None:
        self._trial_store, self._settings = trial_store, trial_store.study.search.stop_when
        self._seen: Sequence[TrialView] | None = None
        self._reason = ""
        self._judged: tuple[int, ...] = ()
        """Numbers of the complete trials that the terminator judged last."""
        self._terminated = ""

    def reason(self, views: Sequence[TrialView]) -> str:
        """Say why no further configuration is proposed; empty if there may be more.

        Args:
            views: The study's trials; the same object as before if nothing has changed.
        """
        if self._settings is not None and views is not self._seen:
            self._seen = views
            self._reason = self._find_no_improvement(views) or self._ask_terminator()
        return self._reason

    def _find_no_improvement(self, views: Sequence[TrialView]) -> str:
        assert self._settings
        patience, front = self._settings.no_improvement, _front(views)
        if patience is None or not front:
            return ""
        num_since = self._num_looked_at() - self._num_before_improvement(front, views)
        return f"no improvement in {num_since} trials (search.stop_when)" if num_since >= patience else ""

    def _num_looked_at(self, up_to: float = math.inf) -> int:
        """Count the configurations that were trained to the end of an assignment at least once.

        Args:
            up_to: Count only trials with at most this number.
        """
        return sum(_was_looked_at(trial) for trial in self._trial_store.explored() if trial.number <= up_to)

    def _num_before_improvement(self, front: list[Scores], views: Sequence[TrialView]) -> int:
        """Return how many configurations had been looked at when the best scores last improved; record an improvement.

        A study that has no record yet counts those up to the best trial's number.
        """
        study = self._trial_store.optuna_study
        record = study.user_attrs.get(IMPROVEMENT)
        if record is None:
            best = max(view.number for view in views if _may_win(view) and _last(view) in front)
            num_before = self._num_looked_at(best)
        elif any(not _covers(record["front"], scores) for scores in front):
            num_before = self._num_looked_at()
        else:
            num_before = int(record["looked_at"])
        now = {"front": [list(scores) for scores in front], "looked_at": num_before}
        if now != record:  # also a best trial that became worse: the next one need not reach its old score
            study.set_user_attr(IMPROVEMENT, now)
        return num_before

    def _ask_terminator(self) -> str:
        """Ask Optuna's regret bound whether more trials could gain more than the error of a score.

        Source: Makarova et al., Automatic termination for hyperparameter optimization (arXiv 2104.08166).
        """
        assert self._settings
        if not self._settings.terminator:
            return ""
        trials = [trial for trial in self._trial_store.all_trials() if trial.state is TrialState.COMPLETE]
        trials = [trial for trial in trials if not violated_constraints(trial)]
        numbers = tuple(trial.number for trial in trials)
        if numbers != self._judged:
            self._judged, self._terminated = numbers, ""
            bound, error = self._regret_bound(trials), self._error()
            if bound is not None and bound < error:
                self._terminated = (
                    f"further trials are expected to gain at most {bound:.4f}, which is less than the error "
                    f"of a score over seeds, {error:.4f} (search.stop_when)"
                )
        return self._terminated

    def _regret_bound(self, trials: list[FrozenTrial]) -> float | None:
        """Upper bound of what the best trial is worse than the best point of the space; None with too few trials."""
        common = set.intersection(*(set(trial.params) for trial in trials)) if trials else set()
        if len(trials) < MIN_COMPLETE or not common or find_spec("optuna.terminator") is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental and deprecated
            from optuna.terminator import RegretBoundEvaluator

            evaluator = RegretBoundEvaluator(seed=self._trial_store.study.search.seed)
            return float(evaluator.evaluate(trials, self._trial_store.optuna_study.direction))

    def _error(self) -> float:
        """Standard deviation of a score over seeds, as confirmations measured it; without any, a share of the best score."""
        board = leaderboard(self._trial_store.optuna_study)
        variance, freedom = seed_variance(board)
        if freedom:
            return math.sqrt(variance)
        return DEFAULT_ERROR * abs(board.entries[0].mean) if board.entries else 0.0


def describe_stop_when(search: Search) -> Iterator[str]:
    """Yield a line for each condition on which a search ends early."""
    if search.stop_when and (patience := search.stop_when.no_improvement):
        yield f"ends early after {patience} trials without improvement"
    if search.stop_when and search.stop_when.terminator:
        yield "ends early when further trials are expected to gain less than a score varies over seeds"


def terminator_warnings(study: Study) -> Iterator[str]:
    """Yield a line if the terminator can never end a search."""
    search = study.search
    if search.stop_when is None or not search.stop_when.terminator:
        return
    setting = "search.stop_when.terminator never ends this search:"
    if find_spec("optuna.terminator") is None:  # Optuna 6 removes it
        yield f"{setting} Optuna {optuna.__version__} has no terminator any more: use no_improvement"
    elif all(domain.when for domain in study.space.domains.values()):
        yield f"{setting} it needs an unconditional parameter"
    elif num_complete(search) < MIN_COMPLETE:
        yield (
            f"{setting} it needs {MIN_COMPLETE} trials that are trained to their end, which about {num_complete(search)} of "
            f"{search.num_trials} are with search.strategy {search.strategy}: use no_improvement"
        )


def _was_looked_at(trial: FrozenTrial) -> bool:
    ended = status_of(trial) in (TrialStatus.COMPLETE, TrialStatus.PRUNED)
    return ended or any("paused" in piece for piece in assignments(trial))


def _may_win(view: TrialView) -> bool:
    runs_or_ended = view.status in (TrialStatus.RUNNING, TrialStatus.PAUSED, TrialStatus.COMPLETE)
    return runs_or_ended and bool(view.scores) and not view.violation


def _last(view: TrialView) -> Scores:
    return view.scores[max(view.scores)]


def _front(views: Sequence[TrialView]) -> list[Scores]:
    """The best last scores of the trials that may win, each once: one, or with several objectives the Pareto front."""
    scores = [_last(view) for view in views if _may_win(view)]
    return sorted({one for one, is_best in zip(scores, on_pareto_front(scores), strict=True) if is_best})


def _covers(front: Sequence[Sequence[float]], scores: Scores) -> bool:
    """Whether some scores of a front are at least as good in every objective."""
    return any(all(old >= new for old, new in zip(known, scores, strict=True)) for known in front)
