"""MLflow's database as a file: whether it is one, and where its experiments' files are after its folder has moved."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlparse

from csmae.lock import opening
from csmae.sqlite import SQLITE, sqlite_path
from csmae.tracking.outbox import TrackingError
from csmae.tracking.quiet import quiet_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient

ARTIFACTS = "mlartifacts"
"""The folder beside an SQLite file that holds its experiments' files."""

STUDY_ID = "csmae.study_id"
"""The tag of an experiment that holds a study."""

MAGIC = b"SQLite format 3\0"

LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where MLflow keeps absolute addresses of files."""

WAIT_S = 30.0


def client_of(uri: str) -> MlflowClient:
    """A client of a tracking server or database; of the processes that open a new SQLite file at once, one makes its tables.

    Raises:
        TrackingError: The file is no database of MLflow.
        MlflowException: MLflow cannot use it.
    """
    quiet_mlflow()
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    check_file(path)
    with opening(path) if path else nullcontext():
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    written = Path(uri.removeprefix(SQLITE).partition("?")[0]).parent
    if path and written != path.parent:
        with suppress(OSError):
            os.removedirs(written)  # MLflow takes an encoded path for a folder's name, and makes that folder
    return client


def check_file(path: Path | None) -> None:
    """Refuse a file that is not MLflow's, in which MLflow would make its tables all the same.

    Raises:
        TrackingError: It is a folder, no SQLite database, or another program's database.
    """
    if path is None or not path.exists():
        return
    if path.is_dir():
        raise TrackingError(f"{path}: is a folder: name the database in it, such as {path / 'mlflow.db'}")
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        tables = _tables(path) if start == MAGIC else set()
    except OSError as error:
        raise TrackingError(f"{path}: cannot be read: {error.strerror}: let this account read it") from None
    except sqlite3.DatabaseError:
        return  # locked or damaged: MLflow's all the same
    if start and start != MAGIC:
        raise TrackingError(f"{path}: is no SQLite database: restore it, or name another one")
    if tables and not tables & {"experiments", "registered_models"}:
        raise TrackingError(
            f"{path}: is another program's database, not MLflow's: name MLflow's own, such as mlflow.db"
        )


def check_filled(path: Path) -> None:
    """Refuse a file in which there is nothing yet to be read.

    Raises:
        TrackingError: It is not there, or empty.
    """
    if not path.exists():
        raise TrackingError(f"there is no {path}: set MLFLOW_TRACKING_URI to where the search tracked")
    if path.is_file() and not path.stat().st_size:
        raise TrackingError(f"{path} is empty: set MLFLOW_TRACKING_URI to where the search tracked")


def _tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def artifact_location(uri: str, study: str) -> str | None:
    """Where an experiment's files go: beside an SQLite file; None leaves it to the server."""
    path = sqlite_path(uri)
    return (path.absolute().parent / ARTIFACTS / study).as_uri() if path else None


def moves(path: Path) -> dict[str, str]:
    """Locations of studies' files that the database's folder has left behind, and where these files are now.

    MLflow stores absolute addresses, and knows no others. A folder that was moved or renamed, or is a copy, has its files
    beside the database; a database that was copied without them still means the old ones.
    """
    query = (
        "SELECT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id) "
        f"WHERE key = '{STUDY_ID}' AND artifact_location LIKE 'file:%'"
    )
    with closing(sqlite3.connect(path, timeout=WAIT_S)) as database:
        found = [Path(unquote(urlparse(location).path)) for (location,) in database.execute(query)]
    new = {old: path.absolute().parent / ARTIFACTS / old.name for old in found if old.parent.name == ARTIFACTS}
    return {old.as_uri(): now.as_uri() for old, now in new.items() if old != now and _has_moved(old, now)}


def _has_moved(old: Path, new: Path) -> bool:
    if _exists(new):
        return not (_exists(old) and old.samefile(new))  # the same folder through a link
    return not _exists(old)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # behind a folder that this user may not enter
        return False


def current(location: str, moved: dict[str, str]) -> str:
    """A location after the moves."""
    for old, new in moved.items():
        if location == old or location.startswith(f"{old}/"):
            return new + location.removeprefix(old)
    return location


def follow(uri: str) -> None:
    """Rewrite the locations in an SQLite file whose folder has moved; elsewhere there is nothing to do.

    Raises:
        sqlite3.Error: The file cannot be written.
    """
    path = sqlite_path(uri)
    moved = moves(path) if path else {}
    if not path or not moved:
        return
    with _transaction(path) as database:
        for old, new in moved.items():
            for table, column in LOCATIONS:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )


@contextmanager
def _transaction(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield database
        database.execute("COMMIT")
