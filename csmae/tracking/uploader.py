"""The uploader: one background thread that carries an outbox to a tracking server and outlives its failures."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Protocol

from csmae.tracking.outbox import Event, Outbox, TrackingError, UploadPosition

log = logging.getLogger(__name__)

BATCH = 500
"""Events a round."""
PAUSE_S = 1.0
"""Between rounds: many epochs then share one call."""
LONGEST_WAIT_S = 30.0
"""Between attempts while the server does not answer."""
LONGEST_WAIT_CLOSING_S = 4.0
"""The same at the end of a search."""
RETRY_FOR_S = 10.0
"""At the end of a search, with a server that did not answer when last asked."""


FILES = ("artifact", "encoder", "champion")
"""Kinds of events about files. Each run of a search that names a champion hands in anew all that count."""


STATES = ("start", "trial", "end", "finish")
"""Kinds of events that set the state of a study or a trial."""


class RefusedError(Exception):
    """The server does not take this event, and the events behind it need not wait for it."""


def readable(path: Path) -> Path:
    """A file or folder that an event names.

    Raises:
        RefusedError: It is not there, or cannot be read.
    """
    if not path.exists():
        raise RefusedError(f"{path} is gone")
    for each in (path, *path.rglob("*")):
        if not os.access(each, os.R_OK):
            raise RefusedError(f"{each} cannot be read: let this account read it")
    return path


class Sink(Protocol):
    """Where events go. Sending an event again must change nothing."""

    is_new: bool
    """Whether the place held nothing of this study when the sink was made."""
    page: str
    """Where on the server's site the study is shown."""

    def send(self, events: Sequence[Event]) -> None:
        """Store the events.

        Raises:
            RefusedError: The server is well, but does not take one of them.
            Exception: Anything else: try again later, with a new sink.
        """


class Uploader(threading.Thread):
    """Sends what an outbox holds, and what is appended while it runs.

    What a server refuses is remembered, and sent once more at each start.

    Args:
        outbox: The events.
        bookmark: How far they are sent, and what was refused.
        connect: Makes the sink; called in this thread, anew after each failure.
        place: Names the server in messages.
    """

    def __init__(self, outbox: Outbox, bookmark: UploadPosition, connect: Callable[[], Sink], place: str) -> None:
        super().__init__(name=f"upload to {place}", daemon=True)
        self._outbox, self.bookmark, self._connect, self._place = outbox, bookmark, connect, place
        self._sink: Sink | None = None
        self._wake = threading.Event()
        self._closing = False
        self.page: str | None = None
        self._deadline = float("inf")
        self._failures = 0
        self._tried_again = False

    def run(self) -> None:
        """Send until closed and done, or until the closing time is over."""
        while time.monotonic() < self._deadline:
            closing = self._closing
            try:
                sent = self.step()
            except Exception as error:
                self._failed(error)
                self._wait(min(LONGEST_WAIT_S, 2.0 ** (self._failures - 1)))
                continue
            self._recovered()
            if closing and not sent:
                return
            if sent < BATCH and not closing:
                self._wait(PAUSE_S)

    def _wait(self, seconds: float) -> None:
        if self._closing:
            seconds = min(seconds, LONGEST_WAIT_CLOSING_S, max(self._deadline - time.monotonic(), 0))
        self._wake.wait(seconds)
        self._wake.clear()

    def step(self) -> int:
        """Send one batch; how many events it had."""
        if self._sink is None:
            self._sink = self._connect()
            self.page = self._sink.page
            if self._sink.is_new and self.bookmark.offset:
                self.bookmark.move(0)  # the server has lost what it had
        if not self._tried_again:
            for offset in self._to_send_again():
                self._send_one(self._sink, offset)
            self.bookmark.move(self.bookmark.offset)
            self._tried_again = True
        start = self.bookmark.offset
        events, end = self._outbox.read(start, BATCH)
        if end > start:
            self._send(self._sink, events, start, end)
            self.bookmark.move(end)
        return len(events)

    def _to_send_again(self) -> list[int]:
        """Offsets of what was refused, and of what set the state of the same trials later: the last state is to stay.

        A champion that a later one replaced is dropped: it would take the alias back.
        """
        refused = self.bookmark.refused
        found, _ = self._outbox.locate(min(refused, default=self.bookmark.offset), limit=1 << 62)
        champion = max((offset for offset, event in found if event.kind == "champion"), default=0)
        again, numbers = set(refused), set()
        for offset, event in found:
            if offset in refused and event.kind == "champion" and offset < champion:
                again.remove(offset)
                del refused[offset]
            elif event.kind in STATES and (offset in refused or event.number in numbers):
                numbers.add(event.number)
                again.add(offset)
        return sorted(offset for offset in again if offset < self.bookmark.offset)

    def _send(self, sink: Sink, events: Sequence[Event], start: int, end: int) -> None:
        """Send the events between two offsets, and remember which were refused."""
        refused = self.bookmark.refused
        try:
            sink.send(events)
            for offset in [offset for offset in refused if offset >= start]:  # of an attempt that broke off
                del refused[offset]
        except RefusedError:
            while start < end:
                start = self._send_one(sink, start)

    def _send_one(self, sink: Sink, offset: int) -> int:
        """Send the event at an offset; the next one's offset."""
        events, following = self._outbox.read(offset, 1)
        refused = self.bookmark.refused
        try:
            sink.send(events)
            refused.pop(offset, None)
        except RefusedError as refusal:
            (event,) = events
            if event.kind in FILES and self._is_replaced(event, following):
                refused.pop(offset, None)
                log.info("%s lacks %s, superseded by a later run of the search: %s", self._place, _name(event), refusal)
                return following
            if offset not in refused:  # else it was told when it was refused first
                log.warning("%s rejected %s: %s", self._place, _name(event), refusal)
            refused[offset] = f"{_where(event)}{f': {event.kind}' if event.kind in FILES else ''}: {refusal}"
        return following

    def _is_replaced(self, event: Event, following: int) -> bool:
        """Whether a later run of the search named its champion; a champion is replaced by any later one."""
        later, _ = self._outbox.read(following, limit=1 << 62)
        if event.kind != "champion":
            later = list(dropwhile(lambda each: each.kind != "start", later))
        return any(each.kind == "champion" for each in later)

    def _failed(self, error: Exception) -> None:
        self._sink = None
        self._failures = min(self._failures + 1, 10)
        if self._failures == 1:
            log.warning("%s: %s; events wait in %s", self._place, reason(error), self._outbox.path)

    def _recovered(self) -> None:
        if self._failures:
            log.warning("%s answers again", self._place)
        self._failures = 0

    @property
    def refused(self) -> list[str]:
        """What was refused and why, one text for all events of a trial that were refused alike."""
        counts = Counter(self.bookmark.refused.values())
        return [text if count == 1 else f"{text} ({count} events)" for text, count in counts.items()]

    def close(self, timeout_s: float) -> int:
        """Send what is left, for so long at most, and let go of the outbox.

        Returns:
            Events that are not sent, those refused left aside; they wait in the outbox.
        """
        if self._failures:
            timeout_s = min(timeout_s, RETRY_FOR_S)
        self._deadline = time.monotonic() + timeout_s
        self._closing = True
        self._wake.set()
        self.join(timeout_s + 0.5)
        left = self._outbox.count(self.bookmark.offset)
        if not self.is_alive():
            self._outbox.close()  # else a call is still out: nobody else may send before this process has ended
        return left


DAMAGED = "its database is damaged: restore it, or move it elsewhere: a new one is filled from the outbox"

REASONS = {
    "Connection refused": "nothing answers there",
    "Connection aborted": "broke off in the middle of an answer",
    "NameResolutionError": "there is no machine of that name",
    "timed out": "does not answer in time",
    "error code 401": "takes no such user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)",
    "error code 403": "does not let this user write",
    "too many 429": "asks for fewer calls",
    "too many 500": "has an internal error",
    "database or disk is full": "its disk is full",
    "No module named 'psycopg": "needs a driver: pip install psycopg2-binary, and postgresql+psycopg2:// as address",
    "out-of-date database schema": "its database was written by another version of MLflow: install that version, or back the "
    "database up and run `mlflow db upgrade` on it",
    "Can't locate revision": "its database was written by another version of MLflow, or another program: install that version",
    "malformed": DAMAGED,
    "file is not a database": DAMAGED,
    "unable to open database file": "its database cannot be opened",
    "database is locked": "its database is locked by another program",
}
"""What a server's failure means, by a part of its text."""


def reason(error: Exception) -> str:
    """What a server's failure means, in words."""
    text = " ".join(str(error).split())
    if isinstance(error, TrackingError):
        return text  # written for the user
    return next((reason for part, reason in REASONS.items() if part in text), text[:200] or type(error).__name__)


def _where(event: Event) -> str:
    return "the study" if event.number is None else f"trial {event.number}"


def _name(event: Event) -> str:
    epoch = f", epoch {event.body['epoch']}" if event.kind == "epoch" else f": {event.kind}"
    return f"{_where(event)}{epoch}"
