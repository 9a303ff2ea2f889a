"""A trial's files while a worker trains it, where the storage is a bucket: a copy on the node, mirrored behind its back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray.train.collective import broadcast_from_rank_zero

from csmae.config import Config, ConfigError, MayChange, changeable
from csmae.scratch import clear, hold, scratch_root
from csmae.settings import flatten
from csmae.storage.manifest import Claim, DeletedError, Manifest, RemoteFolder, SupersededError, objects, snapshot
from csmae.storage.object_store import RETRY_FOR_S, RETRY_S, reason, retry

PREFIX = "trial-"
"""Of the names of working copies."""

COMMON = ".common"
"""The file in a working copy that says what it had in common with the bucket when they last met."""

HOLD_S = 5.0
"""For which a process of an earlier group may still hold its copy."""

KEPT_S = 24 * 3600.0
"""For how long a dead worker's copy stays that holds what the bucket does not."""


def saved_epoch(run_dir: Path) -> tuple[int, dict[str, float]] | None:
    """The epoch of the last checkpoint with its metrics: its report may have been lost with the process."""
    path = run_dir / "encoder" / "config.json"
    if not path.exists():
        return None
    details = json.loads(path.read_text(encoding="utf-8"))["details"]
    return details["epoch"], details["metrics"]


def copy_folder(files: RemoteFolder, rank: int) -> Path:
    """Where this machine keeps a rank's copy of a trial's files, whichever search trains it."""
    name = f"{files.bucket.url.partition('?')[0]}/{files.key}"
    return scratch_root() / f"{PREFIX}{zlib.crc32(name.encode()):08x}-{files.key.replace('/', '-')}-rank-{rank}"


def clear_copies(root: Path | None = None) -> None:
    """Remove the copies of dead workers, but for those that may hold what the bucket never got."""
    with suppress(OSError, ConfigError):  # what cannot be removed now is removed by the next
        clear(root or scratch_root(), PREFIX, keep=_may_be_needed)


def _may_be_needed(folder: Path) -> bool:
    common = _common(folder)
    if common is None or not folder.name.endswith("rank-0") or common.files == objects(folder):
        return False
    return time.time() - max((path.stat().st_mtime for path in folder.iterdir()), default=0.0) < KEPT_S


def _common(folder: Path) -> Manifest | None:
    try:
        return Manifest(**json.loads((folder / COMMON).read_text()))
    except (OSError, ValueError, TypeError):
        return None


class WorkingCopy:
    """One rank's copy of a trial's files. Rank 0 writes; the others read the state that it found.

    Args:
        files: Of the trial.
        folder: Of this rank on this node; another one beside it is taken where a process still uses it.
        marks: Of the trial's configuration, see ``marks_of``: files with none of them count as none; the first is written.
        beat: Called while the bucket keeps this rank waiting.
    """

    def __init__(self, files: RemoteFolder, folder: Path, marks: Sequence[str], beat: Callable[[], object]) -> None:
        self._files, self._marks, self._beat = files, marks, beat
        self._claim: Claim | None = None
        self._pending: Path | None = None
        self._changed = threading.Condition()
        self._over, self._trouble, self._lost, self._deleted = False, "", False, False
        self._pusher: threading.Thread | None = None
        self._offered: dict[str, str] = {}
        self._ended, self._left = False, False
        try:
            self.folder, self._lock = folder, hold(folder, beat, HOLD_S)
        except TimeoutError:  # of a process that hangs, or of another driver's workers on this node
            self.folder = folder.with_name(f"{folder.name}-{os.getpid()}")
            self._lock = hold(self.folder, beat, HOLD_S)

    def take_up(self, first: bool) -> None:
        """Bring the folder to the trial's last state, the same on all ranks. Collective.

        Raises:
            FullDiskError: The bucket does not answer, on all ranks alike.
        """
        for stale in self.folder.glob(".state-*"):
            shutil.rmtree(stale, ignore_errors=True)
        state = broadcast_from_rank_zero(self._reconcile() if first else None)
        if not isinstance(state, Manifest):
            self.let_go()
            raise _full_disk(str(state))
        if first:
            self._pusher = threading.Thread(target=self._push, name="mirror", daemon=True)
            self._pusher.start()
        else:
            _remove(self.folder, all_but=state.files)
            retry(lambda: self._files.fetch(self.folder, state), self._beat)

    def _reconcile(self) -> Manifest | str:
        """Of the node's state and the bucket's, the newer one on both sides; or why not, in one line."""
        common = _common(self.folder)
        if common is None or common.note.get("mark") not in self._marks:  # of a trial that the ledger has forgotten
            _remove(self.folder, all_but={})

        def newer() -> Manifest:
            self._claim = claim = self._claim or self._files.claim()
            there = claim.state if claim.state.note.get("mark") in self._marks else Manifest()
            if _progress(self.folder) > (there.note.get("epoch", 0), there.note.get("steps", 0)):
                there = claim.push(self.folder, self._note(self.folder))
            self._files.fetch(self.folder, there)
            self._note_common(there)
            return there

        try:
            return retry(newer, self._beat)
        except SupersededError as error:
            self._superseded(error)
        except OSError as error:
            self._trouble = reason(error)
        return self._why(self._trouble)

    def _note_common(self, state: Manifest) -> None:
        draft = self.folder / f"{COMMON}.tmp"
        draft.write_text(json.dumps({"files": state.files, "note": {"mark": self._marks[0]}}))
        draft.replace(self.folder / COMMON)

    def mirror(self) -> None:
        """Have the bucket get what was written, soon; called by rank 0 between epochs, waits for nothing.

        Raises:
            FullDiskError: Other workers have taken the trial over, or its files were deleted.
            OSError: The node's disk is full; the next call tries again.
        """
        if self._pusher is None:
            return
        if self._lost:
            raise _full_disk(self._trouble)
        now = objects(self.folder)
        if now == self._offered:
            return
        state = self._snapshot()
        self._offered = now
        with self._changed:
            skipped, self._pending = self._pending, state
            self._changed.notify_all()
        if skipped:
            shutil.rmtree(skipped, ignore_errors=True)

    def _snapshot(self) -> Path:
        state = Path(tempfile.mkdtemp(prefix=".state-", dir=self.folder))
        try:
            return snapshot(self.folder, state)
        except OSError:
            shutil.rmtree(state, ignore_errors=True)
            raise

    def give_back(self) -> None:
        """Wait until the bucket has all, or the trial's files were deleted there, and clear the node.

        Raises:
            FullDiskError: The bucket does not take it; the node keeps it.
        """
        deadline = time.monotonic() + RETRY_FOR_S
        self._end()
        while self._pusher and self._pusher.is_alive() and time.monotonic() < deadline:
            self._pusher.join(RETRY_S)
            self._beat()
        if (self._lost and not self._deleted) or (self._pusher and self._pusher.is_alive()):
            self.let_go()
            raise _full_disk(self._why(self._trouble or "does not come to an end"))
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def let_go(self) -> None:
        """End without waiting, after an error; what was written is still sent as long as this process lives."""
        self._end()
        with self._changed:
            self._left = True
            if self._pusher is None or self._ended:
                self._release()

    def _end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _release(self) -> None:
        """Let others take the node's folder up, or remove it."""
        if self._lock >= 0:
            if self._deleted:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
        self._lock = -1

    def _push(self) -> None:
        """The thread."""
        self._send()
        with self._changed:
            self._ended = True
            if self._left:
                self._release()

    def _send(self) -> None:
        """The latest state goes to the bucket, again and again until it is there."""
        while True:
            with self._changed:
                while self._pending is None and not self._over:
                    self._changed.wait()
                state, self._pending = self._pending, None
            if state is None or self._lost:
                return
            if not self._pushed(state):
                with self._changed:
                    self._pending, state = (state, None) if self._pending is None else (self._pending, state)
                time.sleep(RETRY_S)
            if state:
                shutil.rmtree(state, ignore_errors=True)

    def _pushed(self, state: Path) -> bool:
        """Whether the bucket has it, or never will."""
        assert self._claim
        try:
            self._note_common(self._claim.push(state, self._note(state)))
        except SupersededError as error:
            self._superseded(error)
        except OSError as error:
            self._trouble = reason(error)
            return False
        return True

    def _superseded(self, error: SupersededError) -> None:
        self._trouble, self._deleted = str(error), isinstance(error, DeletedError)
        self._lost = True

    def _note(self, folder: Path) -> dict[str, object]:
        epoch, steps = _progress(folder)
        return {"mark": self._marks[0], "epoch": epoch, "steps": steps}

    def _why(self, trouble: str) -> str:
        """What is wrong, where, and what to do."""
        return trouble if self._lost else f"--storage {self._files.bucket.url}: {trouble}: run again when it does"


def _full_disk(why: str) -> Exception:
    from csmae.training.checkpoint import FullDiskError  # seconds of torch

    return FullDiskError(why)


def _progress(folder: Path) -> tuple[int, int]:
    from csmae.training.checkpoint import progress  # seconds of torch

    return progress(folder)


def _remove(folder: Path, all_but: Mapping[str, str]) -> None:
    """Remove what an earlier training left in a copy, but for these files in these versions."""
    for name, version in objects(folder).items():
        if all_but.get(name) != version:
            (folder / name).unlink()


@contextmanager
def working_copy(
    files: RemoteFolder, folder: Path, marks: Sequence[str], first: bool, beat: Callable[[], object]
) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A rank's copy of a trial's files for as long as the block lasts; arguments as of ``WorkingCopy``. Collective.

    Yields:
        The folder, and what is to be called between epochs: it has the bucket get what was written.

    Raises:
        FullDiskError: The bucket does not answer.
    """
    from csmae.training.checkpoint import FullDiskError  # seconds of torch
    from csmae.training.trainer import StoppedError

    copy = WorkingCopy(files, folder, marks, beat)
    copy.take_up(first)
    clear_copies(folder.parent)
    try:
        yield copy.folder, copy.mirror
    except StoppedError:  # saved in the middle of an epoch, and the node will go
        with suppress(FullDiskError, OSError):
            copy.mirror()
            copy.give_back()
        raise
    except BaseException:
        with suppress(FullDiskError, OSError):
            copy.mirror()
        copy.let_go()
        raise
    copy.give_back()


def marks_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Checksums over what a trial learns by: this version's, and that of 0.1.0, whose checkpoints are resumed.

    What may change while a trial trains is left out, as are defaults, whose number grows.
    """
    free, default = changeable(MayChange.IN_TRAINING), dict(flatten(Config().model_dump(mode="json")))
    values = dict(flatten(json.loads(json.dumps(config))))
    learnt = {name: value for name, value in values.items() if name not in free and value != default.get(name)}
    return _checksum(learnt), _checksum(
        {name: section for name, section in config.items() if name not in ("data", "eval")}
    )


def _checksum(values: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"
