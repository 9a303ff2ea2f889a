"""A trial's files while a worker trains it, where the storage is a bucket: a copy on the node, mirrored behind its back."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train.collective import broadcast_from_rank_zero

from csmae.tuning.bucket import PATIENCE_S, RETRY_S, patiently, reason
from csmae.tuning.file_set import FileSet, Manifest, snapshot


def saved_epoch(run_dir: Path) -> tuple[int, dict[str, float]] | None:
    """The epoch of the last checkpoint with its metrics: its report may have been lost with the process."""
    path = run_dir / "encoder" / "config.json"
    if not path.exists():
        return None
    details = json.loads(path.read_text(encoding="utf-8"))["details"]
    return details["epoch"], details["metrics"]


class WorkingCopy:
    """One rank's copy of a trial's files. Rank 0 writes; the others read the state that it found.

    Args:
        files: Of the trial.
        folder: Of this rank on this node.
        mark: Of the trial's configuration: files of another one count as none.
        beat: Called while the bucket keeps this rank waiting.
    """

    def __init__(self, files: FileSet, folder: Path, mark: str, beat: Callable[[], object]) -> None:
        self._files, self._folder, self._mark, self._beat = files, folder, mark, beat
        self._pending: Path | None = None
        self._changed = threading.Condition()
        self._over, self._trouble = False, ""
        self._pusher: threading.Thread | None = None
        self._offered: list[tuple[str, int]] = []

    def take_up(self, first: bool) -> None:
        """Bring the folder to the trial's last state, the same on all ranks. Collective.

        Raises:
            FullDiskError: The bucket does not answer, on all ranks alike.
        """
        state = broadcast_from_rank_zero(self._reconcile() if first else None)
        if not isinstance(state, Manifest):
            raise self._unreachable(str(state))
        if first:
            self._pusher = threading.Thread(target=self._push, name="mirror", daemon=True)
            self._pusher.start()
        else:
            patiently(lambda: self._files.fetch(self._folder, state), self._beat)

    def _reconcile(self) -> Manifest | str:
        """Of the node's state and the bucket's, the newer one on both sides; or why not."""
        self._folder.mkdir(parents=True, exist_ok=True)

        def newer() -> Manifest:
            there, saved = self._files.manifest(), saved_epoch(self._folder)
            if there.note.get("mark") != self._mark:  # of a trial that the ledger has forgotten
                there = Manifest()
            if saved and saved[0] > there.note.get("epoch", 0):
                return self._files.push(self._folder, self._note(self._folder))
            self._files.fetch(self._folder, there)
            return there

        try:
            return patiently(newer, self._beat)
        except OSError as error:
            return reason(error)

    def mirror(self) -> None:
        """Have the bucket get what was written, soon; called by rank 0 between epochs, waits for nothing."""
        if self._pusher is None:
            return
        now = [(str(path), path.stat().st_mtime_ns) for path in sorted(self._folder.rglob("*")) if path.is_file()]
        if now == self._offered:
            return
        self._offered = now
        state = snapshot(self._folder, Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=self._folder.parent)))
        with self._changed:
            skipped, self._pending = self._pending, state
            self._changed.notify_all()
        if skipped:
            shutil.rmtree(skipped, ignore_errors=True)

    def give_back(self) -> None:
        """Wait until the bucket has all, and clear the node.

        Raises:
            FullDiskError: The bucket does not take it; the node keeps it.
        """
        deadline = time.monotonic() + PATIENCE_S
        self.let_go()
        while self._pusher and self._pusher.is_alive():
            self._pusher.join(RETRY_S)
            self._beat()
            if time.monotonic() > deadline:
                raise self._unreachable(self._trouble or "does not come to an end")
        shutil.rmtree(self._folder, ignore_errors=True)

    def let_go(self) -> None:
        """End without waiting, after an error; the node keeps its files."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _push(self) -> None:
        """The thread: the latest state goes to the bucket, again and again until it is there."""
        while True:
            with self._changed:
                while self._pending is None and not self._over:
                    self._changed.wait()
                state, self._pending = self._pending, None
            if state is None:
                return
            if not self._pushed(state):
                with self._changed:
                    self._pending, state = (state, None) if self._pending is None else (self._pending, state)
                time.sleep(RETRY_S)
            if state:
                shutil.rmtree(state, ignore_errors=True)

    def _pushed(self, state: Path) -> bool:
        try:
            self._files.push(state, self._note(state))
        except OSError as error:
            self._trouble = reason(error)
            return False
        return True

    def _note(self, folder: Path) -> dict[str, object]:
        saved = saved_epoch(folder)
        return {"mark": self._mark, "epoch": saved[0] if saved else 0}

    def _unreachable(self, why: str) -> Exception:
        from csmae.training.checkpoint import FullDiskError  # seconds of torch

        return FullDiskError(f"--storage {self._files.bucket.url}: {why}: run again when it does")


@contextmanager
def working_copy(
    files: FileSet, folder: Path, mark: str, first: bool, beat: Callable[[], object]
) -> Iterator[Callable[[], None]]:
    """A rank's copy of a trial's files for as long as the block lasts; arguments as of ``WorkingCopy``. Collective.

    Yields:
        To be called between epochs: has the bucket get what was written.

    Raises:
        FullDiskError: The bucket does not answer.
    """
    copy = WorkingCopy(files, folder, mark, beat)
    copy.take_up(first)
    try:
        yield copy.mirror
    except BaseException:
        copy.let_go()
        raise
    copy.give_back()


def mark_of(config: Mapping[str, Any]) -> str:
    """A checksum over what a trial learns by; its archive may lie elsewhere the next time."""
    learnt = {section: values for section, values in config.items() if section not in ("data", "eval")}
    return f"{zlib.crc32(json.dumps(learnt, sort_keys=True).encode()):08x}"
