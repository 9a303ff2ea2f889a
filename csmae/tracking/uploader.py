"""The uploader: one background thread that sends an outbox to a tracking server and survives the server's failures."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import dropwhile

from csmae.tracking.destination import explain
from csmae.tracking.outbox import ALL, Outbox, TrackingEvent, UploadPosition
from csmae.tracking.sink import RejectedError, Sink, run_name

log = logging.getLogger(__name__)

BATCH = 500
"""Events that one call of a sink gets."""
PAUSE_S = 1.0
"""Between batches, so that many epochs share one request."""
MAX_WAIT_S = 30.0
"""Longest wait between attempts while the server does not answer."""
MAX_WAIT_CLOSING_S = 4.0
"""The same while closing."""
CLOSE_FAILING_S = 10.0
"""How long closing takes at most if the server did not answer the last attempt."""

FILES = ("artifact", "encoder", "champion")
"""Kinds of events about files. Each run of a search that names a champion adds all that count once more."""

STATES = ("start", "trial", "end", "finish")
"""Kinds of events that set the state of a study or a trial."""


class Uploader(threading.Thread):
    """Sends the events of an outbox, and those appended while it runs. A thread of the driver.

    Events that the server rejects are remembered, and sent once more at each start.

    Args:
        outbox: The events.
        position: How far they are uploaded, and which were rejected.
        connect: Makes the sink; called in this thread, again after each failure.
        destination: Names the server in messages.
    """

    def __init__(self, outbox: Outbox, position: UploadPosition, connect: Callable[[], Sink], destination: str) -> None:
        super().__init__(name=f"upload to {destination}", daemon=True)
        self._outbox, self.position, self._connect, self._destination = outbox, position, connect, destination
        self._sink: Sink | None = None
        self._wake = threading.Event()
        self._closing = False
        self._deadline = float("inf")
        self._failures = 0
        self._retried_rejected = False

    def run(self) -> None:
        """Send until closed and complete, or until the time for closing is over."""
        while time.monotonic() < self._deadline:
            closing = self._closing
            try:
                num_sent = self.step()
            except Exception as error:
                self._fail(error)
                self._wait(min(MAX_WAIT_S, 2.0 ** (self._failures - 1)))
                continue
            self._recover()
            if closing and not num_sent:
                return
            if num_sent < BATCH and not closing:
                self._wait(PAUSE_S)

    def _wait(self, seconds: float) -> None:
        if self._closing:
            seconds = min(seconds, MAX_WAIT_CLOSING_S, max(self._deadline - time.monotonic(), 0))
        self._wake.wait(seconds)
        self._wake.clear()

    def step(self) -> int:
        """Send one batch.

        Returns:
            Number of its events.
        """
        if self._sink is None:
            self._sink = self._connect()
            if self._sink.is_new and self.position.offset:
                self.position.move(0)  # the server has lost its data
        if not self._retried_rejected:
            for offset in self._to_retry():
                self._send_one(self._sink, offset)
            self.position.move(self.position.offset)
            self._retried_rejected = True
        start = self.position.offset
        events, end = self._outbox.read(start, BATCH)
        if end > start:
            self._send(self._sink, events, start, end)
            self.position.move(end)
        return len(events)

    def _to_retry(self) -> list[int]:
        """Offsets of rejected events, and of later events that set the state of the same trials: the last state must win.

        A rejected champion that a later one replaced is dropped: it would take the alias back.
        """
        rejected = self.position.rejected
        found, _ = self._outbox.locate(min(rejected, default=self.position.offset), ALL)
        champion = max((offset for offset, event in found if event.kind == "champion"), default=0)
        retried, numbers = set(rejected), set()
        for offset, event in found:
            if offset in rejected and event.kind == "champion" and offset < champion:
                retried.remove(offset)
                del rejected[offset]
            elif event.kind in STATES and (offset in rejected or event.number in numbers):
                numbers.add(event.number)
                retried.add(offset)
        return sorted(offset for offset in retried if offset < self.position.offset)

    def _send(self, sink: Sink, events: Sequence[TrackingEvent], start: int, end: int) -> None:
        """Send the events between two offsets, and remember which were rejected."""
        rejected = self.position.rejected
        try:
            sink.send(events)
            for offset in [offset for offset in rejected if offset >= start]:  # from an attempt that failed midway
                del rejected[offset]
        except RejectedError:
            while start < end:
                start = self._send_one(sink, start)

    def _send_one(self, sink: Sink, offset: int) -> int:
        """Send the event at an offset.

        Returns:
            The offset of the next one.
        """
        events, following = self._outbox.read(offset, 1)
        rejected = self.position.rejected
        try:
            sink.send(events)
            rejected.pop(offset, None)
        except RejectedError as error:
            (event,) = events
            if event.kind in FILES and self._is_replaced(event, following):
                rejected.pop(offset, None)
                log.info(
                    "%s lacks %s, superseded by a later run of the search: %s", self._destination, _name(event), error
                )
                return following
            if offset not in rejected:  # else it was logged when it was rejected first
                log.warning("%s rejected %s: %s", self._destination, _name(event), error)
            rejected[offset] = f"{_where(event)}{f': {event.kind}' if event.kind in FILES else ''}: {error}"
        return following

    def _is_replaced(self, event: TrackingEvent, following: int) -> bool:
        """Whether a later run of the search named its champion; any later champion replaces a champion."""
        later, _ = self._outbox.read(following, ALL)
        if event.kind != "champion":
            later = list(dropwhile(lambda each: each.kind != "start", later))
        return any(each.kind == "champion" for each in later)

    def _fail(self, error: Exception) -> None:
        self._sink = None
        self._failures = min(self._failures + 1, 10)
        if self._failures == 1:
            log.warning("%s: %s; events wait in %s", self._destination, explain(error), self._outbox.path)

    def _recover(self) -> None:
        if self._failures:
            log.warning("%s answers again", self._destination)
        self._failures = 0

    @property
    def rejected(self) -> list[str]:
        """What was rejected and why, one text for all events of a trial with the same reason."""
        counts = Counter(self.position.rejected.values())
        return [text if count == 1 else f"{text} ({count} events)" for text, count in counts.items()]

    def close(self, timeout_s: float) -> int:
        """Send the remaining events for at most ``timeout_s`` seconds, then close the outbox.

        Returns:
            Number of events that are not uploaded, without the rejected ones; they wait in the outbox.
        """
        if self._failures:
            timeout_s = min(timeout_s, CLOSE_FAILING_S)
        self._deadline = time.monotonic() + timeout_s
        self._closing = True
        self._wake.set()
        self.join(timeout_s + 0.5)
        num_unsent = self._outbox.count(self.position.offset)
        if not self.is_alive():
            self._outbox.close()  # otherwise a call is still running: no other process may send before this one has ended
        return num_unsent


def _where(event: TrackingEvent) -> str:
    return "the study" if event.number is None else run_name(event.number)


def _name(event: TrackingEvent) -> str:
    epoch = f", epoch {event.body['epoch']}" if event.kind == "epoch" else f": {event.kind}"
    return f"{_where(event)}{epoch}"
