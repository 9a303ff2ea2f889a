"""What stays on disk of trials that are over."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from optuna.trial import FrozenTrial

from csmae.storage.manifest import Files, SupersededError
from csmae.storage.object_store import reason
from csmae.trials.attributes import CONFIRMS, START
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.trial import was_cut_short

log = logging.getLogger(__name__)


class CheckpointRetention:
    """Removes checkpoints and encoders that nobody will need.

    Those of the best trials, of those trained again, of the Pareto front, of the starting points and of trials that the
    budget cut short stay; the others' scores are in the ledger, and their seeds make them again.

    Args:
        ledger: Of the study.
    """

    def __init__(self, trial_store: TrialStore) -> None:
        self._trial_store = trial_store
        self._gone: set[int] = set()
        self._bucket = ThreadPoolExecutor(1, "tidy")

    def remove_unneeded(self) -> None:
        """Look through the trials that are over."""
        search = self._trial_store.study.search
        keep = max(search.keep, search.confirm.top if search.confirm else 0)
        board = leaderboard(self._trial_store.optuna_study)
        finalists = {standing.trial.number for standing in board.entries if standing.is_finalist}
        first = {standing.trial.number for standing in board.entries[:keep]}
        best = {trial.number for trial in self._trial_store.ranked()[:keep]} | first | board.front | finalists
        for trial in self._trial_store.trials():
            if trial.state.is_finished() and trial.number not in self._gone | best and not _stays(trial):
                self._gone.add(trial.number)
                self._remove(trial.number)

    def _remove(self, number: int) -> None:
        run_dir = self._trial_store.run_dir(number)
        for path in (run_dir / "checkpoint.pt", *run_dir.glob(".*.tmp")):  # which a kill may have left half written
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s: cannot be removed: %s", path, error.strerror)
        shutil.rmtree(self._trial_store.encoder_dir(number), ignore_errors=True)
        if self._trial_store.files:
            self._bucket.submit(_delete, self._trial_store.files, run_dir)  # the search waits for no bucket

    def finish(self) -> None:
        """Remove what a bucket got of such trials after they were over, or could not remove at the time."""
        self._bucket.shutdown(cancel_futures=True)  # the loop below removes the rest, or gives up at once
        files = self._trial_store.files
        if files is None:
            return
        try:
            for number in sorted(self._gone):
                _delete(files, self._trial_store.run_dir(number))
        except SupersededError:
            return  # another driver decides now what is needed, and the search says so as it ends
        except OSError as error:
            log.warning("%s: %s: files of trials that nobody needs stay there", files.bucket.url, reason(error))


def _delete(files: Files, run_dir: Path) -> None:
    files.check()
    files.of(run_dir).delete()


def _stays(trial: FrozenTrial) -> bool:
    return CONFIRMS not in trial.user_attrs and (was_cut_short(trial) or START in trial.user_attrs)
