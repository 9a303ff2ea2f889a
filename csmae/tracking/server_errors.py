"""What an error of a tracking server or database means, in one line."""

from __future__ import annotations

from csmae.tracking.outbox import TrackingError

DAMAGED = "its database is damaged: restore it, or move it elsewhere: a new one is filled from the outbox"

MEANINGS = {
    "Connection refused": "nothing answers there",
    "Connection aborted": "broke off in the middle of an answer",
    "NameResolutionError": "its host name is unknown",
    "timed out": "does not answer in time",
    "error code 401": "rejects this user and password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)",
    "error code 403": "does not let this user write",
    "too many 429": "asks for fewer requests",
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
"""By a part of the error's text."""


def explain(error: Exception) -> str:
    """Say in one line what an error means; a ``TrackingError`` does so itself."""
    text = " ".join(str(error).split())
    if isinstance(error, TrackingError):
        return text
    return next((meaning for part, meaning in MEANINGS.items() if part in text), text[:500] or type(error).__name__)
