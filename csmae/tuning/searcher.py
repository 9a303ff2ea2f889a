"""Between Tune, which executes, and the ledger, which remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher

from csmae.config import Config, ConfigError
from csmae.tuning.events import Ended, Listener, Reported, Started
from csmae.tuning.ledger import Ledger

METRICS = "metrics/"
"""Prefix of an epoch's metrics in a flattened result."""

MAX_IMPOSSIBLE = 200
"""Proposals in a row that do not validate before the space is given up."""


class SpaceError(ConfigError):
    """No proposal of the sampler makes a valid configuration."""


@dataclass
class _Live:
    trial: optuna.Trial
    last_epoch: int


class LedgerSearcher(Searcher):  # type: ignore[misc]
    """Proposes what the ledger holds next and writes down how each trial ends.

    Args:
        ledger: Of the study.
        folder: Of the study; a trial's folder is ``trials/<number>`` in it.
        listener: Told of every event after it is on record.
    """

    def __init__(self, ledger: Ledger, folder: Path, listener: Listener) -> None:
        super().__init__()
        self._ledger, self._folder, self._listener = ledger, folder, listener
        self._live: dict[str, _Live] = {}
        self._num_known = len(ledger.trials())

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: the ledger is what lasts, and Tune's own snapshots are not used."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """What the slot gets: number, whether it is a starting point, folder and configuration."""
        resumed = self._ledger.num_left > 0
        if not resumed and self._num_known >= self._ledger.study.search.num_trials:
            return str(Searcher.FINISHED)
        trial, values, config = self._propose()
        self._num_known += not resumed
        self._live[trial_id] = _Live(trial, self._ledger.epochs(trial))
        self._listener(Started(trial.number, values, config.train.epochs, resumed))
        return {
            "number": trial.number,
            "start": trial.user_attrs.get("start", False),
            "run_dir": str(self._folder / "trials" / str(trial.number)),
            "config": config.model_dump(mode="json"),
        }

    def _propose(self) -> tuple[optuna.Trial, dict[str, Any], Config]:
        """The next trial whose values go together; those that do not are written down as failed, untrained."""
        study = self._ledger.study
        for _ in range(MAX_IMPOSSIBLE):
            trial = self._ledger.next()
            values = study.space.suggest(trial)
            try:
                return trial, values, study.resolve(values)
            except ConfigError as error:
                reason = str(error).splitlines()[0]
                self._ledger.fail(trial, reason, trained=False)
        raise SpaceError(f"the space has next to no valid configuration; the last of {MAX_IMPOSSIBLE} tried: {reason}")

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Write down an epoch, once."""
        live, epoch = self._live[trial_id], result.get("epoch")
        if epoch is None or epoch <= live.last_epoch:
            return
        live.last_epoch = epoch
        metrics = {key.removeprefix(METRICS): value for key, value in result.items() if key.startswith(METRICS)}
        objective = self._ledger.study.search.objective
        if objective in metrics:
            self._ledger.report(live.trial, epoch, metrics[objective])
        self._listener(Reported(live.trial.number, epoch, metrics))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Write down how a trial ended: to its end, stopped by the scheduler, or failed."""
        result = result or {}
        self.on_trial_result(trial_id, result)
        trial = self._live.pop(trial_id).trial
        for left in ("checkpoint.pt", ".checkpoint.pt.tmp"):  # nothing goes on from it any more; the encoder stays
            (self._folder / "trials" / str(trial.number) / left).unlink(missing_ok=True)
        value = result.get(METRICS + self._ledger.study.search.objective)
        reason = "the slot's process died or could not start, again and again" if error else result.get("failed")
        if reason is not None:
            self._ledger.fail(trial, reason)
        elif result.get("finished"):
            reason = self._ledger.complete(trial, value)
        else:
            self._ledger.prune(trial)
            self._listener(Ended(trial.number, "PRUNED", value))
            return
        self._listener(Ended(trial.number, "COMPLETE" if reason is None else "FAIL", value, reason))
