"""URLs of SQLite files, as SQLAlchemy reads them for Optuna and MLflow."""

from __future__ import annotations

from pathlib import Path

from csmae.config import ConfigError

SQLITE = "sqlite:///"


def sqlite_url(path: Path) -> str:
    """Return the URL of a database file; ``?`` and ``%`` in its path are not those of a URL.

    Raises:
        ConfigError: The installed SQLAlchemy cannot express the path (releases before 2.1 cannot).
    """
    from sqlalchemy import make_url

    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    for url in (f"{SQLITE}{path}", f"{SQLITE}{quoted}"):  # a plain path is easier to read
        if sqlite_path(url) == path and not make_url(url).query:
            return url
    raise ConfigError(f"{path}: must not contain '?' or '%': rename the folder, or install SQLAlchemy 2.1 or later")


def sqlite_path(url: str) -> Path | None:
    """Return the file of an SQLite URL, with or without a driver's name; None for any other URL."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    if not url.startswith("sqlite"):
        return None
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None
