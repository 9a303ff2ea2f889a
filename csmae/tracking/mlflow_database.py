"""Opens MLflow, checks its SQLite file, and finds the experiments' files after their folder has moved.

MLflow stores absolute addresses of files. A search and ``sync`` rewrite those of their own study; a reader translates them.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote, urlparse

from csmae.lock import database_lock
from csmae.sqlite import SQLITE, sqlite_path
from csmae.tracking.outbox import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the uploader retries; a repeated POST would create a second run
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Environment variables of MLflow."""

ARTIFACTS = "mlartifacts"
"""The folder beside an SQLite file that holds its experiments' files."""

STUDY_ID = "csmae.study_id"
"""The tag of an experiment that holds a study."""

MAGIC = b"SQLite format 3\0"

ADDRESS_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns in which MLflow keeps absolute addresses of files."""

LOCK_TIMEOUT_S = 30.0


def quiet_mlflow() -> None:
    """Set ``SETTINGS`` that the user has not set, and hide info messages; must be called before MLflow is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)  # hides the creation of tables


def open_client(uri: str) -> MlflowClient:
    """Open a tracking server or database; if several processes open a new SQLite file, one of them creates its tables.

    Raises:
        TrackingError: The file is not a database of MLflow.
        MlflowException: MLflow cannot use it.
    """
    quiet_mlflow()
    from mlflow import MlflowClient

    path = sqlite_path(uri)
    check_file(path)
    with database_lock(path) if path else nullcontext():
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    encoded = Path(uri.removeprefix(SQLITE).partition("?")[0]).parent
    if path and uri.startswith(SQLITE) and encoded != path.parent:
        with suppress(OSError):
            os.removedirs(encoded)  # MLflow creates a folder of the name that the URI has before it is decoded
    return client


def check_file(path: Path | None) -> None:
    """Reject a file that is not MLflow's: MLflow would create its tables in any SQLite file.

    Raises:
        TrackingError: It is a folder, not an SQLite database, or another program's database.
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
        return  # locked or damaged: MLflow's error says which
    if start and start != MAGIC:
        raise TrackingError(f"{path}: is not an SQLite database: restore it, or name another one")
    if tables and not tables & {"experiments", "registered_models"}:
        raise TrackingError(
            f"{path}: is another program's database, not MLflow's: name MLflow's own, such as mlflow.db"
        )


def check_not_empty(path: Path) -> None:
    """Reject a database from which nothing can be read.

    Raises:
        TrackingError: It does not exist, or is empty.
    """
    if not path.exists():
        raise TrackingError(f"there is no {path}: set MLFLOW_TRACKING_URI to the server or database of the search")
    if path.is_file() and not path.stat().st_size:
        raise TrackingError(f"{path} is empty: set MLFLOW_TRACKING_URI to the server or database of the search")


def _tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def artifact_location(uri: str, study: str) -> str | None:
    """Where a new experiment's files go: beside an SQLite file; None lets the server choose."""
    path = sqlite_path(uri)
    return (path.absolute().parent / ARTIFACTS / study).as_uri() if path else None


def moved_locations(path: Path) -> dict[str, str]:
    """Locations of studies' files that are stored in the database, and where these files are now.

    A folder that was moved, renamed or copied has its files beside the database. A database that was copied without them
    still refers to the old ones.
    """
    return {moved.stored.as_uri(): moved.beside.as_uri() for moved in _moved(path) if _exists(moved.beside)}


def translate(location: str, moved: dict[str, str]) -> str:
    """The current address of a stored location, see ``moved_locations``."""
    for old, new in moved.items():
        if location == old or location.startswith(f"{old}/"):
            return new + location.removeprefix(old)
    return location


class _StudyFiles(NamedTuple):
    """Where a study's files may be."""

    study: str
    stored: Path
    """According to the database."""
    beside: Path
    """Beside the database."""
    has_encoders: bool
    """Whether files were stored: a search stores encoders and plots together."""


def _moved(path: Path) -> list[_StudyFiles]:
    """Studies whose stored location is not beside the database, where this program puts files.

    A location whose last part is not the experiment's name was chosen by a server.
    """
    query = (
        "SELECT name, artifact_location, EXISTS (SELECT 1 FROM logged_models AS m WHERE m.experiment_id = e.experiment_id) "
        "FROM experiments AS e JOIN experiment_tags AS t ON t.experiment_id = e.experiment_id "
        f"WHERE t.key = '{STUDY_ID}' AND artifact_location LIKE 'file:%'"
    )
    folder = path.absolute().parent
    with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as database:
        found = [
            _StudyFiles(name, Path(unquote(urlparse(location).path)), folder / ARTIFACTS / name, bool(encoders))
            for name, location, encoders in database.execute(query)
        ]
    return [
        files
        for files in found
        if files.stored.parts[-2:] == (ARTIFACTS, files.study)
        and not _are_same(files.stored, files.beside)
        and not _are_same(files.stored.parent.parent, folder)  # through a link
    ]


def _are_same(one: Path, other: Path) -> bool:
    return one == other or (_exists(one) and _exists(other) and one.samefile(other))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # inside a folder that this user may not enter
        return False


def update_locations(uri: str, study: str) -> None:
    """Rewrite the stored locations of one study in an SQLite file whose folder has moved; a server needs nothing.

    Other studies stay: they may be running on a machine that mounts the folder at another path.

    Raises:
        TrackingError: The study's files are neither at the stored location nor beside the database.
        sqlite3.Error: The file cannot be written.
    """
    path = sqlite_path(uri)
    for files in _moved(path) if path else ():
        if path and files.study == study and _must_update(files):
            _rewrite(path, files.stored.as_uri(), files.beside.as_uri())


def _must_update(files: _StudyFiles) -> bool:
    """Whether a study's files are beside the database, or no file can be out of reach."""
    if _exists(files.beside):
        return True
    if _exists(files.stored):
        return False
    if files.has_encoders and not _exists(files.stored.parent):
        raise TrackingError(
            f"the files of study {files.study!r} are in {files.stored}, which does not exist here: mount or copy it, "
            f"or make the folder {files.beside} if they are lost"
        )
    return True


def _rewrite(path: Path, old: str, new: str) -> None:
    with closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        for table, column in ADDRESS_COLUMNS:
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
            )
        database.execute("COMMIT")
