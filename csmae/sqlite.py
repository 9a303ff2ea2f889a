"""The address of an SQLite file, as SQLAlchemy and so Optuna and MLflow read it."""

from __future__ import annotations

from pathlib import Path

from csmae.config import ConfigError

SQLITE = "sqlite:///"


def sqlite_url(path: Path) -> str:
    """The URL of a database in a file; ``?`` and ``%`` in the path do not mean what they mean in a URL.

    Raises:
        ConfigError: The installed SQLAlchemy cannot express the path (releases before 2.1 cannot).
    """
    from sqlalchemy import make_url

    quoted = str(path).replace("%", "%25").replace("?", "%3F")
    for url in (f"{SQLITE}{path}", f"{SQLITE}{quoted}"):  # a plain path stays readable
        if sqlite_path(url) == path and not make_url(url).query:
            return url
    raise ConfigError(f"{path}: must contain no '?' or '%': rename the folder, or install SQLAlchemy 2.1 or later")


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite URL, with or without the name of a driver; None for any other URL."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    if not url.startswith("sqlite"):
        return None
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None
