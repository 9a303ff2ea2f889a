"""Which checkpoints and encoders stay on disk after their trials have ended."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from optuna.trial import FrozenTrial

from csmae.atomic import DRAFTS
from csmae.config import ConfigError
from csmae.model.cost import checkpoint_bytes
from csmae.storage.layout import CHECKPOINT
from csmae.storage.manifest import RemoteStorage, SupersededError
from csmae.storage.object_store import describe_error
from csmae.study.options import num_bytes
from csmae.trial_status import TrialStatus
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.trial import (
    confirmed_number,
    is_cut_short,
    is_dropped,
    is_starting_point,
    params_of,
    parent_number,
    status_of,
)

log = logging.getLogger(__name__)


class CheckpointRetention:
    """Removes the checkpoints and encoders of trials that nobody will need. Runs in the driver.

    It keeps those of the best trials, of finalists, of the Pareto front, of starting points, of paused trials and of trials that
    were cut short. The scores of the others stay in the trial store, and their seeds reproduce them.

    Args:
        trial_store: Of the study.
    """

    def __init__(self, trial_store: TrialStore) -> None:
        self._trial_store = trial_store
        self._removed: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._bucket_thread = ThreadPoolExecutor(1, "checkpoint-retention")

    def remove_unneeded(self) -> None:
        """Remove the files of ended trials that are not kept."""
        search = self._trial_store.study.search
        num_best = max(search.keep, search.confirm.top if search.confirm else 0)
        board = leaderboard(self._trial_store.optuna_study)
        kept = {entry.trial.number for entry in board.entries[:num_best]} | board.front
        kept |= {entry.trial.number for entry in board.entries if entry.is_finalist}
        kept |= {trial.number for trial in board.ranked[:num_best]}
        for trial in self._trial_store.trials():
            if trial.state.is_finished() and trial.number not in self._removed | kept and not _is_protected(trial):
                self._removed.add(trial.number)
                self._remove(trial.number)

    def limit_disk(self, expectation: Callable[[], Mapping[int, float]]) -> None:
        """Remove the checkpoints of paused trials until all of them fit into ``search.disk_limit``.

        Args:
            expectation: Returns how likely each paused trial is to be resumed; the least likely one loses its checkpoint first.
        """
        if not (limit := self._trial_store.study.search.disk_limit):
            return
        trials = {
            t.number: t for t in self._trial_store.trials() if t.number not in self._removed and not is_dropped(t)
        }
        excess = sum(map(self._size, trials.values())) - num_bytes(limit)
        if excess <= 0:
            return
        paused = [t for t in trials.values() if status_of(t) is TrialStatus.PAUSED and parent_number(t) is None]
        likely = expectation()
        for trial in sorted(paused, key=lambda trial: likely.get(trial.number, -math.inf)):
            self._trial_store.record_dropped(trial.number)
            self._remove(trial.number)
            excess -= self._size(trial)
            if excess <= 0:
                return
        log.warning("search.disk_limit %s is exceeded by checkpoints that are in use or kept", limit)

    def _size(self, trial: FrozenTrial) -> int:
        """Bytes of a trial's checkpoint and encoder."""
        if trial.number not in self._sizes:
            try:
                self._sizes[trial.number] = checkpoint_bytes(self._trial_store.study.resolve(params_of(trial)))
            except ConfigError:  # the search's present settings do not allow the configuration
                self._sizes[trial.number] = checkpoint_bytes(self._trial_store.study.resolve({}))
        return self._sizes[trial.number]

    def _remove(self, number: int) -> None:
        run_dir = self._trial_store.run_dir(number)
        for path in (run_dir / CHECKPOINT, *run_dir.rglob(DRAFTS)):  # a killed worker leaves temporary files
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s: cannot be removed: %s", path, error.strerror)
        shutil.rmtree(self._trial_store.encoder_dir(number), ignore_errors=True)
        if self._trial_store.remote:  # in a thread: the search must not wait for the bucket
            self._bucket_thread.submit(_delete, self._trial_store.remote, run_dir)

    def finish(self) -> None:
        """Delete from the bucket what arrived after its trial had ended, and what could not be deleted earlier."""
        self._bucket_thread.shutdown(cancel_futures=True)  # the loop below repeats the canceled deletions
        remote = self._trial_store.remote
        if remote is None:
            return
        try:
            for number in sorted(self._removed):
                _delete(remote, self._trial_store.run_dir(number))
        except SupersededError:
            return  # another driver now decides what is kept; the search reports that
        except OSError as error:
            log.warning(
                "%s: %s: files of trials that are no longer needed remain", remote.store.url, describe_error(error)
            )


def _delete(remote: RemoteStorage, run_dir: Path) -> None:
    remote.claim.check()
    remote.remote_folder(run_dir).delete()


def _is_protected(trial: FrozenTrial) -> bool:
    return confirmed_number(trial) is None and (is_cut_short(trial) or is_starting_point(trial))
