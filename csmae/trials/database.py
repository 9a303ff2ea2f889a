"""Optuna's database of studies in an SQLite file: how it is opened, and what is said of one that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from csmae.config import ConfigError
from csmae.engine_logs import quiet_optuna
from csmae.lock import opening
from csmae.sqlite import sqlite_url

DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError)
"""What a database raises that is locked, damaged, or on a full disk. An ``OSError`` is of something else: a terminal, a file."""


def open_storage(path: Path) -> optuna.storages.RDBStorage:
    """The database of studies in a file; SQLite waits for half a minute where another process writes."""
    quiet_optuna()
    with opening(path):
        return optuna.storages.RDBStorage(sqlite_url(path), engine_kwargs={"connect_args": {"timeout": 30}})


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Open a database and read from it.

    Raises:
        ConfigError: It is locked, of another Optuna, damaged, or on a full disk.
    """
    try:
        yield
    except (
        *DATABASE_ERRORS,
        OSError,
        RuntimeError,
    ) as error:  # OSError: of its folder; RuntimeError: what Optuna says of another version's
        raise ConfigError(unusable(path, error)) from None


def unusable(path: Path, error: Exception) -> str:
    """What to say of a database that cannot be used."""
    reason = " ".join(str(error.__cause__ or error).partition("[SQL")[0].split())[:160]
    if "disk is full" in reason or "No space left" in reason:
        return f"{path}: the disk is full: make room"
    if "locked" in reason:
        return f"{path}: another process holds the database of studies: try again when it is done"
    if "no longer compatible" in reason:
        return (
            f"{path}: was written by another version of Optuna than {optuna.__version__}, which is installed: "
            "install that version, or use another --storage"
        )
    return f"{path}: cannot be used as a database of studies: {reason}: restore it, or use another --storage"
