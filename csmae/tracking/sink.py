"""What the sinks for MLflow and Weights & Biases have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from csmae.tracking.outbox import HEADER, KINDS, TrackingEvent


class RejectedError(Exception):
    """The server is reachable and does not accept this event; the events after it need not wait for it."""


class Sink(Protocol):
    """Stores events on a server. Storing an event again must change nothing."""

    is_new: bool
    """Whether the server held nothing of this study when the sink was made."""

    def send(self, events: Sequence[TrackingEvent]) -> None:
        """Store the events.

        Raises:
            RejectedError: The server does not accept one of them.
            Exception: Anything else: try again later, with a new sink.
        """


def dispatch(sink: Sink, event: TrackingEvent) -> None:
    """Call the sink's method for a kind of event: ``_trial`` for ``trial`` and so on.

    Raises:
        RejectedError: Another version of this program wrote the event: its kind is unknown, or its body lacks a part.
    """
    if event.kind == HEADER:
        return
    if event.kind not in KINDS:
        raise RejectedError(f"this version knows no event of kind {event.kind!r}")
    try:
        getattr(sink, f"_{event.kind}")(event)
    except KeyError as error:
        raise RejectedError(f"the event has no {error}") from error


def readable(path: Path) -> Path:
    """Check a file or folder that an event names, and return it.

    Raises:
        RejectedError: It does not exist, or cannot be read.
    """
    if not path.exists():
        raise RejectedError(f"{path} no longer exists")
    for each in (path, *path.rglob("*")):
        if not os.access(each, os.R_OK):
            raise RejectedError(f"{each} cannot be read: let this account read it")
    return path


def run_name(number: int | None) -> str:
    """The run of a trial, or of the study where ``number`` is None."""
    return "study" if number is None else f"trial {number}"
