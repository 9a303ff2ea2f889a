"""The outbox: every tracking event is in a file of the study before anyone tries to upload it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from csmae.config import ConfigError
from csmae.lock import unwritable

log = logging.getLogger(__name__)

OUTBOX = "outbox.jsonl"
"""Its name in a study's folder."""

REFUSED = "refused"
"""In a bookmark's file, what each place did not take."""

KINDS = ("start", "trial", "epoch", "end", "artifact", "encoder", "champion", "finish")
"""What can happen in a study."""

HEADER = "outbox"
"""Kind of the first event: its body holds the identity of the study."""


PATHS = ("path", "encoder_dir")
"""Parts of a body that name files. In the file they are relative to the study's folder, which may move."""


class TrackingError(ConfigError):
    """Tracking that cannot be set up as asked."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a study."""

    kind: str
    """What happened: one of ``KINDS``."""
    number: int | None
    """The trial; None is the study itself."""
    time_ms: int
    """When, milliseconds since 1970. Part of a metric's identity: the same event sent twice is stored once."""
    body: dict[str, Any]
    """The rest, plain JSON values."""

    def to_line(self) -> bytes:
        """One line of the file."""
        return json.dumps(vars(self), default=str).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self | None:
        """The event of a line; None for a line that is none, as a power cut may leave one."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return None

    def within(self, folder: Path) -> Self:
        """The event as it is stored in a study's folder: what names files in the folder is relative to it."""
        return self._replace(lambda path: path.relative_to(folder) if path.is_relative_to(folder) else path)

    def found_in(self, folder: Path) -> Self:
        """The event as it is handed out: what names files names them where the study's folder is now."""
        return self._replace(lambda path: _locate(path, folder))

    def _replace(self, change: Callable[[Path], Path]) -> Self:
        paths = {name: str(change(Path(self.body[name]))) for name in PATHS if isinstance(self.body.get(name), str)}
        return replace(self, body={**self.body, **paths}) if paths else self


def _locate(path: Path, folder: Path) -> Path:
    """Where a file is that a study's outbox names; an absolute path was written by release 0.1.0, or is of no study."""
    if not path.is_absolute():
        return folder / path
    inner = (path.parts[at + 1 :] for at, part in enumerate(path.parts) if part == folder.name)
    return next((there for parts in inner if (there := folder.joinpath(*parts)).exists()), path)


class Outbox:
    """An append-only file of events with one writing process; its end is repaired when it is opened.

    A full disk ends nothing: lines that could not be written stay in memory and go with the next event. A thread has
    the disk keep what was written, many events at once: an fsync behind a database's may take a second.

    Args:
        path: The file; made, with its folder, where there is none.

    Raises:
        TrackingError: Another process writes to it, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent.absolute()
        self._unwritten = b""
        self._lock = threading.Lock()
        self._disk = ThreadPoolExecutor(1, "fsync")
        self._kept: Future[None] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise TrackingError(f"{path}: another process writes to this study: let it end first") from None
        except OSError as error:
            raise TrackingError(unwritable(path, error)) from None
        self._size = self._cut_torn_end()
        self.study_id = self._identify()

    def _cut_torn_end(self) -> int:
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        size = content.rfind(b"\n") + 1
        os.ftruncate(self._file, size)
        return size

    def _identify(self) -> str:
        header = next(iter(self.read(0, 1)[0]), None)
        if header is None:
            header = Event(HEADER, None, 0, {"study_id": uuid.uuid4().hex})
            self.append(header).result()
        if header.kind != HEADER:
            raise TrackingError(
                f"{self.path}: is not an outbox (its first line does not identify a study); move it elsewhere"
            )
        return str(header.body["study_id"])

    def append(self, event: Event) -> Future[None]:
        """Write an event at the end; it survives the process at once, and a power cut when the result is done."""
        with self._lock:
            told = bool(self._unwritten)
            self._unwritten += event.within(self.folder).to_line()
            try:
                self._write(self._unwritten)
            except OSError as error:
                if not told:
                    log.warning("%s: cannot be written (%s): events wait in memory", self.path, error.strerror)
            if self._kept is None or self._kept.running() or self._kept.done():  # else it will find this event too
                self._kept = self._disk.submit(self._keep)
            return self._kept

    def _keep(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            log.warning("%s: may not survive a power cut: %s", self.path, error.strerror)

    def _write(self, lines: bytes) -> None:
        written = 0
        try:
            while written < len(lines):
                written += os.pwrite(self._file, lines[written:], self._size + written)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += written
        self._unwritten = b""

    def read(self, offset: int, limit: int) -> tuple[list[Event], int]:
        """Events from a byte offset on.

        Args:
            offset: Where a line starts: 0, or what an earlier call returned.
            limit: Events at most.

        Returns:
            The events, and the offset behind the last of them.
        """
        found, end = self.locate(offset, limit)
        return [event for _, event in found], end

    def locate(self, offset: int, limit: int) -> tuple[list[tuple[int, Event]], int]:
        """Events from a byte offset on, each with its own offset; otherwise as ``read``."""
        events: list[tuple[int, Event]] = []
        for line in self._lines(offset, limit):
            event = Event.from_line(line)
            if event is None:
                log.warning("%s: a damaged line before byte %d is left out", self.path, offset + len(line))
            else:
                events.append((offset, event.found_in(self.folder)))
            offset += len(line)
        return events, offset

    def _lines(self, offset: int, limit: int) -> list[bytes]:
        size = self._size  # lines beyond it are still being written
        with self.path.open("rb") as file:
            file.seek(offset)
            lines: list[bytes] = []
            while len(lines) < limit and file.tell() < size:
                lines.append(file.readline())
        return lines

    def count(self, offset: int) -> int:
        """Events behind a byte offset, those in memory included and the header left out."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return sum(1 for _ in file) - (offset == 0) + self._unwritten.count(b"\n")

    def close(self) -> None:
        """Let another process write."""
        self._disk.shutdown()
        os.close(self._file)


class UploadPosition:
    """How far an outbox has been uploaded to one place, kept in a file beside it.

    Args:
        path: The file; it serves every place to which this outbox was ever uploaded.
        study_id: Identity of the outbox; a bookmark of another one counts as none.
        place: Where the events go, without password.
        former: What release 0.1.0 called the place.
    """

    def __init__(self, path: Path, study_id: str, place: str, former: str = "") -> None:
        self._path, self._study_id, self._place = path, study_id, place
        content = self._load()
        known = former if former in content and place not in content else place
        self.offset = int(content.get(known, 0))
        refused = content.get(REFUSED, {}).get(known, {})
        self.refused: dict[int, str] = {int(offset): text for offset, text in refused.items()}
        """Byte offsets before ``offset`` of events that the place did not take, each with which and why."""

    def _load(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return dict(content) if content.get("study_id") == self._study_id else {}

    def move(self, offset: int) -> None:
        """Remember that everything before ``offset`` is uploaded, apart from what was refused."""
        self.offset = offset
        self.refused = {place: text for place, text in self.refused.items() if place < offset}
        content = self._load()
        refused = {**content.get(REFUSED, {}), self._place: self.refused}
        content |= {"study_id": self._study_id, self._place: offset, REFUSED: refused}
        draft = self._path.with_suffix(".new")
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.replace(self._path)
