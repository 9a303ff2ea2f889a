"""MLflow's database as a file: whether it is one, and where its experiments' files are after its folder has moved."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, unquote, urlparse

from csmae.lock import opening
from csmae.sqlite import SQLITE, sqlite_path
from csmae.tracking.mlflow_settings import quiet_mlflow
from csmae.tracking.outbox import TrackingError

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
    if path and uri.startswith(SQLITE) and written != path.parent:
        with suppress(OSError):
            os.removedirs(written)  # MLflow takes an encoded path for a folder's name, and makes that folder
    return client


def check_file(path: Path | None) -> None:
    """Refuse a file that is not MLflow's, in which MLflow would make its tables all the same.

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
        return  # locked or damaged: MLflow's all the same
    if start and start != MAGIC:
        raise TrackingError(f"{path}: is not an SQLite database: restore it, or name another one")
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
    return {place.old.as_uri(): place.new.as_uri() for place in _left_behind(path) if _exists(place.new)}


class _Place(NamedTuple):
    """Where a study's files are."""

    study: str
    old: Path
    """According to the database."""
    new: Path
    """Beside the database."""
    has_encoders: bool
    """Whether files were stored; a search stores encoders and pictures together."""


def _left_behind(path: Path) -> list[_Place]:
    """Studies whose location is not beside the database, though this program puts it there.

    A location whose last part is not the experiment's name was chosen by a server.
    """
    query = (
        "SELECT name, artifact_location, EXISTS (SELECT 1 FROM logged_models AS m WHERE m.experiment_id = e.experiment_id) "
        "FROM experiments AS e JOIN experiment_tags AS t ON t.experiment_id = e.experiment_id "
        f"WHERE t.key = '{STUDY_ID}' AND artifact_location LIKE 'file:%'"
    )
    folder = path.absolute().parent
    with closing(sqlite3.connect(path, timeout=WAIT_S)) as database:
        places = [
            _Place(name, Path(unquote(urlparse(location).path)), folder / ARTIFACTS / name, bool(encoders))
            for name, location, encoders in database.execute(query)
        ]
    return [
        place
        for place in places
        if place.old.parts[-2:] == (ARTIFACTS, place.study)
        and not _are_same(place.old, place.new)
        and not _are_same(place.old.parent.parent, folder)  # through a link
    ]


def _are_same(one: Path, other: Path) -> bool:
    return one == other or (_exists(one) and _exists(other) and one.samefile(other))


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


def follow(uri: str, study: str) -> None:
    """Rewrite the locations of one study in an SQLite file whose folder has moved; elsewhere there is nothing to do.

    Other studies may be running on a machine where the folder has another path.

    Raises:
        TrackingError: The study's files are neither at their old nor at their new place.
        sqlite3.Error: The file cannot be written.
    """
    path = sqlite_path(uri)
    for place in _left_behind(path) if path else ():
        if path and place.study == study and _has_moved(place):
            _rewrite(path, place.old.as_uri(), place.new.as_uri())


def _has_moved(place: _Place) -> bool:
    """Whether a study's files are at the new place, or it has none that could be out of reach only."""
    if _exists(place.new):
        return True
    if _exists(place.old):
        return False
    if place.has_encoders and not _exists(place.old.parent):
        raise TrackingError(
            f"the files of study {place.study!r} are in {place.old}, which does not exist here: mount or copy it, "
            f"or make the folder {place.new} if they are lost"
        )
    return True


def _rewrite(path: Path, old: str, new: str) -> None:
    with _transaction(path) as database:
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
