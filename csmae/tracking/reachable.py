"""Whether a study's events would be taken by where they go."""

from __future__ import annotations

import os

from csmae.sqlite import sqlite_path
from csmae.tracking.mlflow_database import check_file
from csmae.tracking.outbox import TrackingError
from csmae.tracking.tracker import WANDB, shown
from csmae.tracking.uploader import reason


def unreachable(uri: str) -> str | None:
    """Why MLflow does not answer at a URI; None where it does, or where its database will be made.

    Args:
        uri: As of a ``Tracker``.
    """
    try:
        place = shown(uri)
        check_file(sqlite_path(uri))
    except TrackingError as error:
        return str(error)
    if uri.startswith(WANDB):
        return None  # only a run of its own would tell
    path = sqlite_path(uri)
    if path and not path.exists():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        return None if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    from csmae.tracking.mlflow_sink import ask  # seconds of import

    try:
        ask(uri)
    except Exception as error:  # a server that is not well answers in any way
        return f"{place}: {reason(error)}"
    return None
