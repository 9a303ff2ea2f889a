"""Where the events of a study go, MLflow or Weights & Biases, and what errors from there mean."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from csmae.config import one_line
from csmae.sqlite import sqlite_path, sqlite_url
from csmae.tracking.mlflow_database import check_file
from csmae.tracking.outbox import TrackingError

WANDB = "wandb://"
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")
"""URL schemes of MLflow's tracking stores."""
PROJECT = re.compile(r"([\w.-]+/)?[^/\\#?%:\s]([^/\\#?%:]{0,126}[^/\\#?%:\s])?")

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
"""What an error of a server or database means, by a part of its text."""


def tracking_uri(given: str | None, storage: Path, logger: str = "mlflow") -> str:
    """Choose the destination of a study's events.

    Args:
        given: ``--mlflow-uri``: a tracking URI of MLflow, or with ``wandb`` a project or ``ENTITY/PROJECT``.
        storage: Folder of the studies.
        logger: ``mlflow`` or ``wandb``.

    Returns:
        With ``mlflow``, what was given, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the folder; with ``wandb``, the
        project ``csmae`` by default.

    Raises:
        TrackingError: With ``wandb``, a tracking URI of MLflow.
    """
    if logger == "wandb":
        project = (given or "csmae").removeprefix(WANDB)
        if "://" in project or project.startswith("sqlite:"):
            raise TrackingError(
                f"--logger wandb: --mlflow-uri must be a project or ENTITY/PROJECT, found {redacted(project)}"
            )
        return WANDB + project
    return given or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(storage / "mlflow.db")


def check_uri(uri: str) -> None:
    """Reject a URI to which no events can be sent.

    Raises:
        TrackingError: MLflow has no store of that scheme, the file is not a database of MLflow, the project's name is not
            allowed, or Weights & Biases is not installed.
    """
    if uri.startswith(WANDB):
        _check_project(uri)
    elif urlsplit(uri).scheme.partition("+")[0] not in SCHEMES:
        raise TrackingError(
            f"MLflow URI {redacted(uri)!r}: must start with sqlite:///, postgresql://, http:// or https://; "
            "or wandb://PROJECT for Weights & Biases"
        )
    check_file(sqlite_path(uri))


def _check_project(uri: str) -> None:
    if not PROJECT.fullmatch(uri.removeprefix(WANDB)):
        raise TrackingError(
            f"{uri}: must be wandb://PROJECT or wandb://ENTITY/PROJECT; a project has up to 128 characters without / \\ # ? % :"
        )
    if not find_spec("wandb"):
        raise TrackingError(f"{uri}: Weights & Biases is not installed: pip install 'csmae[wandb]'")


def redacted(uri: str) -> str:
    """The URI without user and password."""
    login, at, _ = urlsplit(uri).netloc.rpartition("@")
    return uri.replace(login + at, "", 1)


def unreachable(uri: str) -> str | None:
    """Say why events cannot be sent to a URI; None where they can, or where the search will create the database."""
    try:
        check_uri(uri)
    except TrackingError as error:
        return str(error)
    if uri.startswith(WANDB):
        return None  # only starting a run would show it
    path = sqlite_path(uri)
    if path and not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        return None if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    from csmae.tracking.mlflow_sink import ping  # importing MLflow takes seconds

    try:
        ping(uri)
    except Exception as error:  # a broken server can fail in any way
        return f"{redacted(uri)}: {explain(error)}"
    return None


def explain(error: Exception) -> str:
    """Say in one line what an error means; a ``TrackingError`` does so itself."""
    text = one_line(error, None)
    if isinstance(error, TrackingError):
        return text
    return next((meaning for part, meaning in MEANINGS.items() if part in text), text[:500] or type(error).__name__)
