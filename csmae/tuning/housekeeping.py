"""What stays on disk of trials that are over."""

from __future__ import annotations

import shutil

from optuna.trial import FrozenTrial

from csmae.tuning.ledger import CONFIRMS, START, Ledger, was_cut
from csmae.tuning.standings import standings


class Housekeeper:
    """Removes checkpoints and encoders that nobody will need.

    Those of the best trials, of those trained again, of the Pareto front, of the starting points and of trials that the
    budget cut short stay; the others' scores are in the ledger, and their seeds make them again.

    Args:
        ledger: Of the study.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._gone: set[int] = set()

    def tidy(self) -> None:
        """Look through the trials that are over."""
        search = self._ledger.study.search
        keep = max(search.keep, search.confirm.top if search.confirm else 0)
        confirmed = [standing.trial for standing in standings(self._ledger) if standing.num_seeds > 1]
        best = {trial.number for trial in (*self._ledger.ranked()[:keep], *self._ledger.front(), *confirmed)}
        for trial in self._ledger.trials():
            if trial.state.is_finished() and trial.number not in self._gone | best and not _stays(trial):
                self._gone.add(trial.number)
                (self._ledger.run_dir(trial.number) / "checkpoint.pt").unlink(missing_ok=True)
                shutil.rmtree(self._ledger.encoder_dir(trial.number), ignore_errors=True)


def _stays(trial: FrozenTrial) -> bool:
    return was_cut(trial) or (START in trial.user_attrs and CONFIRMS not in trial.user_attrs)
