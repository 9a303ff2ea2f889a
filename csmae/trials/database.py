"""Optuna's database of studies in an SQLite file, and one-line errors where it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from csmae.config import ConfigError, one_line
from csmae.engine_logs import quiet_optuna
from csmae.lock import database_lock
from csmae.settings import did_you_mean
from csmae.sqlite import sqlite_url
from csmae.trials.attributes import DEFINITION, FORMAT, STUDY_FORMAT


class OtherVersionError(ConfigError):
    """Another version of csmae created the study."""


DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError)
"""Errors of a database that is locked, damaged or on a full disk. An ``OSError`` has other causes: a terminal, a file."""


def open_storage(path: Path) -> optuna.storages.RDBStorage:
    """Open the database of studies in a file. SQLite waits up to half a minute for another process that writes."""
    quiet_optuna()
    with database_lock(path):
        return optuna.storages.RDBStorage(sqlite_url(path), engine_kwargs={"connect_args": {"timeout": 30}})


def load_studies(path: Path) -> dict[str, optuna.Study]:
    """Load the studies of a database by name, oldest first, also those of other versions; empty without a database.

    Raises:
        ConfigError: The database cannot be used.
    """
    if not path.exists():
        return {}
    with report_database_errors(path):
        storage = open_storage(path)
        names = optuna.get_all_study_names(storage)
        return {name: optuna.load_study(study_name=name, storage=storage) for name in names}


def load_stored_study(path: Path, name: str) -> optuna.Study:
    """Load a study from a database.

    Raises:
        ConfigError: There is no such study, another version created it, or the database cannot be used.
    """
    studies = load_studies(path)
    if name not in studies:
        raise ConfigError(f"there is no study {name!r} in {path}{did_you_mean(name, studies)}")
    with report_database_errors(path):
        check_format(studies[name], path)
    return studies[name]


def check_format(study: optuna.Study, path: Path) -> None:
    """Reject a study whose attributes this version does not read.

    Args:
        study: May have been created by another program.
        path: The database.

    Raises:
        OtherVersionError: Another version created the study.
    """
    attributes = study.user_attrs
    if DEFINITION in attributes and attributes.get(FORMAT) != STUDY_FORMAT:
        version = "an incompatible version of csmae" if FORMAT in attributes else "csmae 0.1.0"
        raise OtherVersionError(
            f"study {study.study_name!r} in {path} was created by {version}: "
            "use that version for it, or start a new study with --name"
        )


@contextmanager
def report_database_errors(path: Path) -> Iterator[None]:
    """Turn errors of the database into one line, while the block opens and reads it.

    Raises:
        ConfigError: The database is locked, damaged, on a full disk or written by another version of Optuna.
    """
    try:
        yield
    # OSError: of its folder; RuntimeError: Optuna rejects another version's database with it
    except (*DATABASE_ERRORS, OSError, RuntimeError) as error:
        raise ConfigError(describe_database_error(path, error)) from None


def describe_database_error(path: Path, error: Exception) -> str:
    """Describe an error of the database, and what to do."""
    reason = one_line(str(error.__cause__ or error).partition("[SQL")[0], 160)
    if "disk is full" in reason or "No space left" in reason:
        return f"{path}: the disk is full: free some space"
    if "locked" in reason:
        return f"{path}: another process holds the database of studies: try again when it has ended"
    if "no longer compatible" in reason:
        return (
            f"{path}: was written by another version of Optuna than {optuna.__version__}, which is installed: "
            "install that version, or use another --storage"
        )
    return f"{path}: cannot be used as a database of studies: {reason}: restore it, or use another --storage"
