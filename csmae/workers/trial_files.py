"""A trial's files while it is trained with its storage in a bucket: a working copy on each node, uploaded in the background."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray.train.collective import broadcast_from_rank_zero

from csmae.atomic import atomic_write
from csmae.scratch import hold
from csmae.storage.layout import CHECKPOINT
from csmae.storage.manifest import Claim, DeletedError, Manifest, RemoteFolder, SupersededError, hardlink, object_names
from csmae.storage.object_store import RETRY_FOR_S, RETRY_INTERVAL_S, describe_error, retry
from csmae.training.checkpoint import FullDiskError, read_progress
from csmae.workers.working_copies import SYNCED, read_synced, remove_stale_copies

SNAPSHOT_PREFIX = ".snapshot-"
"""Beginning of the names of snapshots in a working copy."""

PARENT = "parent"
"""Folder in a working copy with the checkpoint that the trial copies, until it has its own."""

HOLD_TIMEOUT_S = 5.0
"""Longest wait for a process of an earlier worker group that still holds the working copy."""


def saved_epoch(run_dir: Path) -> tuple[int, dict[str, float]] | None:
    """Return the epoch of the last checkpoint with its metrics: its report may have been lost with the process."""
    path = run_dir / "encoder" / "config.json"
    if not path.exists():
        return None
    details = json.loads(path.read_text(encoding="utf-8"))["details"]
    return details["epoch"], details["metrics"]


class WorkingCopy:
    """One rank's copy of a trial's files, in its train worker. Rank 0 uploads its copy; the others read the state it found.

    Args:
        remote: The trial's files in the bucket.
        folder: This rank's folder on this node; the copy gets another one beside it if a process still holds it.
        fingerprint: From ``config_fingerprint``; files of a trial with another fingerprint are ignored.
        heartbeat: Called while this rank waits for the bucket.
        parent: The files of the trial whose checkpoint this one copies, if it has none.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        folder: Path,
        fingerprint: str,
        heartbeat: Callable[[], object],
        parent: RemoteFolder | None = None,
    ) -> None:
        self._remote, self._fingerprint, self._heartbeat, self._parent = remote, fingerprint, heartbeat, parent
        self._claim: Claim | None = None
        self._uploader = threading.Thread(target=self._upload_snapshots, name="trial-upload", daemon=True)
        self._changed = threading.Condition()
        self._next: Path | None = None
        self._closed = False
        self._scheduled: dict[str, str] = {}
        self._superseded: SupersededError | None = None
        self._failure = "the upload does not finish"
        try:
            self.folder, self._lock = folder, hold(folder, heartbeat, HOLD_TIMEOUT_S)
        except TimeoutError:  # held by a process that hangs, or by another driver's worker on this node
            self.folder = folder.with_name(f"{folder.name}-{os.getpid()}")
            self._lock = hold(self.folder, heartbeat, HOLD_TIMEOUT_S)

    def pull(self, is_writer: bool) -> None:
        """Bring the folder to the trial's last state, the same on all ranks. Collective.

        Args:
            is_writer: Whether this is rank 0, which uploads.

        Raises:
            FullDiskError: The bucket does not answer, or other workers took the trial over; on all ranks alike.
        """
        for stale in self.folder.glob(f"{SNAPSHOT_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
        state = broadcast_from_rank_zero(self._reconcile() if is_writer else None)
        if not isinstance(state, Manifest):
            self.release_later()
            raise FullDiskError(str(state))
        if is_writer:
            self._uploader.start()
        else:
            _remove_others(self.folder, state.files)
            retry(lambda: self._remote.fetch(self.folder, state), self._heartbeat)

    def _reconcile(self) -> Manifest | str:
        """Bring the copy and the bucket to the newer one of their states; returns it, or why that fails."""
        synced = read_synced(self.folder)
        if synced is None or synced.metadata.get("fingerprint") != self._fingerprint:  # of another study of this name
            _remove_others(self.folder, {})

        def newer() -> Manifest:
            self._claim = claim = self._claim or self._remote.claim()
            state = claim.manifest
            if state.metadata.get("fingerprint") != self._fingerprint:
                state = Manifest()
            if read_progress(self.folder) > (state.metadata.get("epoch", 0), state.metadata.get("steps", 0)):
                state = claim.push(self.folder, self._metadata(self.folder))
            self._remote.fetch(self.folder, state)
            if self._parent and not {CHECKPOINT, f"{PARENT}/{CHECKPOINT}"} & state.files.keys():
                self._parent.fetch(self.folder / PARENT, self._parent.manifest(), CHECKPOINT.__eq__)
                # Kept in the bucket from now on, because the parent's own training may continue.
                state = claim.push(self.folder, self._metadata(self.folder))
            self._write_synced(state)
            return state

        try:
            return retry(newer, self._heartbeat)
        except SupersededError as error:
            self._superseded = error
        except OSError as error:
            self._failure = describe_error(error)
        return self._problem()

    def _write_synced(self, state: Manifest) -> None:
        content = {"files": state.files, "metadata": {"fingerprint": self._fingerprint}}
        with atomic_write(self.folder / SYNCED) as file:
            file.write(json.dumps(content).encode())

    def schedule_upload(self) -> None:
        """Have the current files uploaded soon, without waiting; called between epochs.

        Raises:
            FullDiskError: Other workers took the trial over, or its files were deleted.
            OSError: The node's disk is full; the next call tries again.
        """
        if (self.folder / CHECKPOINT).exists():
            shutil.rmtree(self.folder / PARENT, ignore_errors=True)
        if self._claim is None:
            return  # not rank 0
        if self._superseded:
            raise FullDiskError(self._problem())
        files = object_names(self.folder)
        if files == self._scheduled:
            return
        state = self._snapshot()
        self._scheduled = files
        with self._changed:
            skipped, self._next = self._next, state
            self._changed.notify_all()
        if skipped:
            shutil.rmtree(skipped, ignore_errors=True)

    def _snapshot(self) -> Path:
        state = Path(tempfile.mkdtemp(prefix=SNAPSHOT_PREFIX, dir=self.folder))
        try:
            hardlink(self.folder, state)
        except OSError:
            shutil.rmtree(state, ignore_errors=True)
            raise
        return state

    def finish(self) -> None:
        """Wait until everything is uploaded or the trial's files were deleted in the bucket, and remove the copy.

        Raises:
            FullDiskError: The bucket does not accept the upload within ``RETRY_FOR_S``; the copy stays.
        """
        deadline = time.monotonic() + RETRY_FOR_S
        self._close()
        while self._uploader.is_alive() and time.monotonic() < deadline:
            self._uploader.join(RETRY_INTERVAL_S)
            self._heartbeat()
        is_needed = not isinstance(self._superseded, DeletedError)
        if self._uploader.is_alive() or (self._superseded and is_needed):
            self.release_later()
            raise FullDiskError(self._problem())
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def release_later(self) -> None:
        """Stop without waiting, after an error: uploads that are scheduled continue while this process lives."""
        self._close()
        if self._uploader.is_alive():
            threading.Thread(target=self._release, name="trial-release", daemon=True).start()
        else:
            self._release()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _release(self) -> None:
        """Let other processes use or remove the folder once the uploads have ended."""
        if self._uploader.is_alive():
            self._uploader.join()
        if isinstance(self._superseded, DeletedError):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _upload_snapshots(self) -> None:
        """Upload the latest snapshot until there will be no more: the thread."""
        while not self._superseded:
            with self._changed:
                self._changed.wait_for(lambda: self._next or self._closed)
                state, self._next = self._next, None
            if state is None:
                return
            while not self._try_upload(state):
                time.sleep(RETRY_INTERVAL_S)
                if self._next:
                    break  # a later snapshot replaces it
            shutil.rmtree(state, ignore_errors=True)

    def _try_upload(self, state: Path) -> bool:
        """Upload a snapshot; returns whether it need not be tried again."""
        assert self._claim
        try:
            self._write_synced(self._claim.push(state, self._metadata(state)))
        except SupersededError as error:
            self._superseded = error
        except OSError as error:
            self._failure = describe_error(error)
            return False
        return True

    def _metadata(self, folder: Path) -> dict[str, Any]:
        epoch, steps = read_progress(folder)
        return {"fingerprint": self._fingerprint, "epoch": epoch, "steps": steps}

    def _problem(self) -> str:
        """Say what is wrong, where, and what to do."""
        if self._superseded:
            return str(self._superseded)
        return f"--storage {self._remote.store.url}: {self._failure}: run again when the bucket works"


def _remove_others(folder: Path, wanted: Mapping[str, str]) -> None:
    """Remove a copy's files, except those that are the same in a state."""
    for path, object_name in object_names(folder).items():
        if wanted.get(path) != object_name:
            (folder / path).unlink()


@contextmanager
def working_copy(
    remote: RemoteFolder,
    folder: Path,
    fingerprint: str,
    is_writer: bool,
    heartbeat: Callable[[], object],
    parent: RemoteFolder | None = None,
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Keep a rank's copy of a trial's files for as long as the block lasts; see ``WorkingCopy``. Collective.

    Yields:
        The folder, and a function that schedules an upload, to be called between epochs.

    Raises:
        FullDiskError: The bucket does not answer, or other workers took the trial over.
    """
    from csmae.training.trainer import StoppedError  # importing timm takes seconds

    copy = WorkingCopy(remote, folder, fingerprint, heartbeat, parent)
    copy.pull(is_writer)
    remove_stale_copies(folder.parent)
    try:
        yield copy.folder, copy.schedule_upload
    except StoppedError:  # saved in the middle of an epoch, and the node will be taken away
        with suppress(FullDiskError, OSError):
            copy.schedule_upload()
            copy.finish()
        raise
    except BaseException:
        with suppress(FullDiskError, OSError):
            copy.schedule_upload()
        copy.release_later()
        raise
    copy.finish()
