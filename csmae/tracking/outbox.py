"""The outbox: a study's tracking events are appended to a file before they are uploaded, so no server failure loses any."""

from __future__ import annotations

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

from filelock import lock_descriptor

from csmae.atomic import atomic_write
from csmae.config import ConfigError
from csmae.lock import describe_write_error

log = logging.getLogger(__name__)

OUTBOX = "outbox.jsonl"
"""File name in a study's folder."""

KINDS = ("start", "trial", "epoch", "end", "artifact", "encoder", "champion", "finish")
"""Kinds of events of a study."""

HEADER = "outbox"
"""Kind of the first event: its body holds the identity of the study."""

PATHS = ("path", "encoder_dir")
"""Keys of a body that hold paths. Paths inside the study's folder are stored relative to it, because it may move."""

ALL = 1 << 62
"""A limit that no outbox reaches."""


class TrackingError(ConfigError):
    """Events cannot be tracked as requested, or an encoder cannot be fetched."""


@dataclass(frozen=True)
class TrackingEvent:
    """Something that happened in a study."""

    kind: str
    """One of ``KINDS``."""
    number: int | None
    """The trial; None is the study itself."""
    time_ms: int
    """Milliseconds since 1970. Part of a metric's identity: the same event sent twice is stored once."""
    body: dict[str, Any]
    """Everything else, plain JSON values."""

    def to_line(self) -> bytes:
        """Format as one line of the file."""
        return json.dumps(vars(self), default=str).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self | None:
        """Parse a line; None for a line that is not an event, such as a power failure may leave."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return None

    def relative_to(self, folder: Path) -> Self:
        """A copy whose paths inside the study's folder are relative to it."""
        return self._map_paths(lambda path: path.relative_to(folder) if path.is_relative_to(folder) else path)

    def resolved(self, folder: Path) -> Self:
        """A copy whose relative paths are resolved in the study's folder."""
        return self._map_paths(folder.joinpath)

    def _map_paths(self, function: Callable[[Path], Path]) -> Self:
        paths = {key: str(function(Path(self.body[key]))) for key in PATHS if isinstance(self.body.get(key), str)}
        return replace(self, body={**self.body, **paths})


class Outbox:
    """An append-only file of events with one writing process.

    Opening it removes a torn last line. A full disk loses nothing: lines that could not be written stay in memory and are
    written with the next event. A separate thread calls fsync, once for many events: an fsync that waits for a
    database's may take a second.

    Args:
        path: The file; created with its folder if it does not exist.

    Raises:
        TrackingError: Another process writes to it, or it cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent.absolute()
        self._unwritten = b""
        self._lock = threading.Lock()
        self._fsync_thread = ThreadPoolExecutor(1, "fsync")
        self._fsync: Future[None] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            is_locked = lock_descriptor(self._file, blocking=False)
        except OSError as error:
            raise TrackingError(describe_write_error(path, error)) from None
        if not is_locked:
            os.close(self._file)
            raise TrackingError(f"{path}: another process writes to this study: wait until it ends")
        self._size = self._remove_torn_line()
        self.study_id = self._read_header()

    def _remove_torn_line(self) -> int:
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        size = content.rfind(b"\n") + 1
        os.ftruncate(self._file, size)
        return size

    def _read_header(self) -> str:
        """The identity of the study, created for a new outbox."""
        header = next(iter(self.read(0, 1)[0]), None)
        if header is None:
            header = TrackingEvent(HEADER, None, 0, {"study_id": uuid.uuid4().hex})
            self.append(header).result()
        if header.kind != HEADER:
            raise TrackingError(
                f"{self.path}: is not an outbox (its first line does not identify a study); move it elsewhere"
            )
        return str(header.body["study_id"])

    def append(self, event: TrackingEvent) -> Future[None]:
        """Append an event. It survives a kill of the process immediately, and a power failure when the result is done."""
        with self._lock:
            failed_before = bool(self._unwritten)
            self._unwritten += event.relative_to(self.folder).to_line()
            try:
                self._write(self._unwritten)
            except OSError as error:
                if not failed_before:
                    log.warning("%s: cannot be written (%s): events wait in memory", self.path, error.strerror)
            if self._fsync is None or self._fsync.running() or self._fsync.done():  # a pending fsync covers this event
                self._fsync = self._fsync_thread.submit(self._sync)
            return self._fsync

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            log.warning("%s: may not survive a power failure: %s", self.path, error.strerror)

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

    def read(self, offset: int, limit: int) -> tuple[list[TrackingEvent], int]:
        """Read events from a byte offset on.

        Args:
            offset: Start of a line: 0, or what an earlier call returned.
            limit: Maximum number of events.

        Returns:
            The events, and the offset after the last of them.
        """
        found, end = self.locate(offset, limit)
        return [event for _, event in found], end

    def locate(self, offset: int, limit: int) -> tuple[list[tuple[int, TrackingEvent]], int]:
        """Read events like ``read``, each with its own offset."""
        events: list[tuple[int, TrackingEvent]] = []
        for line in self._lines(offset, limit):
            event = TrackingEvent.from_line(line)
            if event is None:
                log.warning("%s: skipped a damaged line before byte %d", self.path, offset + len(line))
            else:
                events.append((offset, event.resolved(self.folder)))
            offset += len(line)
        return events, offset

    def _lines(self, offset: int, limit: int) -> list[bytes]:
        size = self._size  # a line after it is still being written
        with self.path.open("rb") as file:
            file.seek(offset)
            lines: list[bytes] = []
            while len(lines) < limit and file.tell() < size:
                lines.append(file.readline())
        return lines

    def count(self, offset: int) -> int:
        """Number of events after a byte offset, including those in memory, without the header."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return sum(1 for _ in file) - (offset == 0) + self._unwritten.count(b"\n")

    def close(self) -> None:
        """Release the file for other processes."""
        self._fsync_thread.shutdown()
        os.close(self._file)


class UploadPosition:
    """How far an outbox is uploaded to one destination, kept in a file beside it.

    Args:
        path: The file; it holds the positions of all destinations of this outbox.
        study_id: Identity of the outbox; the position in another outbox counts as none.
        destination: Where the events go, without password.
    """

    def __init__(self, path: Path, study_id: str, destination: str) -> None:
        self._path, self._study_id, self._destination = path, study_id, destination
        content = self._load()
        self.offset = int(content.get(destination, 0))
        rejected = content.get("rejected", {}).get(destination, {})
        self.rejected: dict[int, str] = {int(offset): text for offset, text in rejected.items()}
        """Byte offsets before ``offset`` of events that the destination rejected, each with its description and reason."""

    def _load(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return dict(content) if content.get("study_id") == self._study_id else {}

    def move(self, offset: int) -> None:
        """Save that everything before ``offset`` is uploaded, except what was rejected."""
        self.offset = offset
        self.rejected = {at: text for at, text in self.rejected.items() if at < offset}
        content = self._load()
        rejected = {**content.get("rejected", {}), self._destination: self.rejected}
        content |= {"study_id": self._study_id, self._destination: offset, "rejected": rejected}
        with atomic_write(self._path) as file:
            file.write(json.dumps(content).encode())
