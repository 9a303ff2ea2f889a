"""The uploader: one background thread that carries an outbox to a tracking server and outlives its failures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from csmae.tracking.outbox import Bookmark, Event, Outbox

log = logging.getLogger(__name__)

BATCH = 500
"""Events a round."""
PAUSE_S = 1.0
"""Between rounds: many epochs then share one call."""
LONGEST_WAIT_S = 30.0
"""Between attempts while the server does not answer."""
PATIENCE_S = 10.0
"""At the end of a search, with a server that did not answer when last asked."""


class RefusedError(Exception):
    """The server will never take this event: sending it again would not help."""


class Sink(Protocol):
    """Where events go. Sending an event again must change nothing."""

    is_new: bool
    """Whether the place held nothing of this study when the sink was made."""
    page: str
    """Where on the server's site the study is shown."""

    def send(self, events: Sequence[Event]) -> None:
        """Store the events.

        Raises:
            RefusedError: The server is well, but one of them can never be stored.
            Exception: Anything else: try again later, with a new sink.
        """


class Uploader(threading.Thread):
    """Sends what an outbox holds, and what is appended while it runs.

    Args:
        outbox: The events.
        bookmark: How far they are sent.
        connect: Makes the sink; called in this thread, anew after each failure.
        place: Names the server in messages.
    """

    def __init__(self, outbox: Outbox, bookmark: Bookmark, connect: Callable[[], Sink], place: str) -> None:
        super().__init__(name=f"upload to {place}", daemon=True)
        self._outbox, self.bookmark, self._connect, self._place = outbox, bookmark, connect, place
        self._sink: Sink | None = None
        self._wake = threading.Event()
        self._closing = False
        self.page: str | None = None
        self._deadline = float("inf")
        self._failures = 0

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
            if sent < BATCH:
                self._wait(PAUSE_S)

    def _wait(self, seconds: float) -> None:
        self._wake.wait(min(seconds, 0.2) if self._closing else seconds)
        self._wake.clear()

    def step(self) -> int:
        """Send one batch; how many events it had."""
        if self._sink is None:
            self._sink = self._connect()
            self.page = self._sink.page
            if self._sink.is_new and self.bookmark.offset:
                self.bookmark.move(0)  # the server has lost what it had
        events, offset = self._outbox.read(self.bookmark.offset, BATCH)
        if offset > self.bookmark.offset:
            self._send(self._sink, events)
            self.bookmark.move(offset)
        return len(events)

    def _send(self, sink: Sink, events: Sequence[Event]) -> None:
        try:
            sink.send(events)
        except RefusedError as refusal:
            if len(events) == 1:
                log.warning("%s refused %s: %s", self._place, _name(events[0]), refusal)
                return
            for event in events:
                self._send(sink, [event])

    def _failed(self, error: Exception) -> None:
        self._sink = None
        self._failures = min(self._failures + 1, 10)
        if self._failures == 1:
            log.warning("%s: %s; events wait in %s", self._place, reason(error), self._outbox.path)

    def _recovered(self) -> None:
        if self._failures:
            log.warning("%s answers again", self._place)
        self._failures = 0

    def close(self, timeout_s: float) -> int:
        """Send what is left, for so long at most, and let go of the outbox.

        Returns:
            Events that are not sent; they wait in the outbox.
        """
        if self._failures:
            timeout_s = min(timeout_s, PATIENCE_S)
        self._deadline = time.monotonic() + timeout_s
        self._closing = True
        self._wake.set()
        self.join(timeout_s + 0.5)  # it looks at the clock every 0.2 s
        left = self._outbox.count(self.bookmark.offset)
        if not self.is_alive():
            self._outbox.close()  # else a call is still out: nobody else may send before this process has ended
        return left


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
    "database is locked": "its database is locked by another program",
}
"""What a server's failure means, by a part of its text."""


def reason(error: Exception) -> str:
    """What a server's failure means, in words."""
    text = " ".join(str(error).split())
    return next((reason for part, reason in REASONS.items() if part in text), text[:200] or type(error).__name__)


def _name(event: Event) -> str:
    where = "the study" if event.number is None else f"trial {event.number}"
    epoch = f", epoch {event.body['epoch']}" if event.kind == "epoch" else f": {event.kind}"
    return f"{where}{epoch}"
