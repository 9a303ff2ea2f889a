"""From the name of an encoder in MLflow to a folder with its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from csmae.scratch import scratch
from csmae.sqlite import sqlite_path, sqlite_url
from csmae.tracking.mlflow_database import check_filled, client_of, current, moves
from csmae.tracking.outbox import TrackingError
from csmae.tracking.registry import ALIAS, CHECKSUM, MODEL, checksum
from csmae.tracking.tracker import shown
from csmae.tracking.uploader import reason

DEFAULT_DATABASE = Path("runs/mlflow.db")


def fetch_encoder(uri: str, tracking_uri: str | None = None) -> Path:
    """A local folder with an encoder of MLflow, its checksum verified.

    Args:
        uri: ``models:/csmae-encoder@champion``, ``models:/csmae-encoder/3``, ``models:/m-<logged model id>`` or
            ``runs:/<run id>``.
        tracking_uri: The server; by default ``MLFLOW_TRACKING_URI``, or ``runs/mlflow.db`` where it exists.

    Returns:
        A folder that holds ``encoder.safetensors`` and ``config.json``. It is not yours to change.

    Raises:
        TrackingError: No server, no such encoder, or files that are not those registered.
    """
    place = tracking_uri or _default_uri()
    database = sqlite_path(place)
    try:
        if database:
            check_filled(database)
        client = client_of(place)
        location, sha256 = _find(client, uri)
        folder = _local_folder(current(location, moves(database)) if database else location, sha256, place)
    except TrackingError as error:
        raise TrackingError(str(error) if str(error).startswith(uri) else f"{uri}: {error}") from None
    except Exception as error:  # a server or database that is not well answers in any way
        raise TrackingError(f"{uri}: {shown(place)}: {reason(error)}") from None
    if checksum(folder) != sha256:
        raise TrackingError(
            f"{uri}: {folder} does not hold the files that were registered: its checksum differs: restore it, or load another version"
        )
    return folder


def _default_uri() -> str:
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if DEFAULT_DATABASE.exists():
        return sqlite_url(DEFAULT_DATABASE.absolute())  # MLflow keeps a store by its URI, whatever the folder is now
    raise TrackingError(f"no MLflow: set MLFLOW_TRACKING_URI, or start where {DEFAULT_DATABASE} is")


def _find(client: Any, uri: str) -> tuple[str, str]:
    """Where the files of a URI are, and their checksum."""
    scheme, _, name = uri.partition(":/")
    name = name.strip("/")
    if scheme == "runs" and name:
        models = client.search_logged_models([client.get_run(name).info.experiment_id], f"source_run_id = '{name}'")
        if not models:
            raise TrackingError(f"{uri}: this run has no encoder: the best trials' have, and the champion's")
        model = max(models, key=lambda model: (str(model.status) == "READY", model.creation_timestamp))
        return model.artifact_location, model.tags.get(CHECKSUM, "")
    if scheme == "models" and "@" in name:
        version = client.get_model_version_by_alias(*name.split("@", 1))
    elif scheme == "models" and "/" in name:
        version = client.get_model_version(*name.split("/", 1))
    elif scheme == "models" and name.startswith("m-"):
        model = client.get_logged_model(name)
        return model.artifact_location, model.tags.get(CHECKSUM, "")
    else:
        raise TrackingError(f"{uri}: must be models:/{MODEL}@{ALIAS}, models:/{MODEL}/VERSION or runs:/RUN_ID")
    return version.source, version.tags.get(CHECKSUM, "")


def _local_folder(location: str, sha256: str, place: str) -> Path:
    """The files where they are if this machine holds them, else downloaded once."""
    url = urlparse(location)
    if url.scheme in ("", "file"):
        return Path(unquote(url.path))
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "csmae" / (sha256 or "unknown")
    if not cache.exists():
        _download(location, cache, place)
    return cache


def _download(location: str, folder: Path, place: str) -> None:
    from mlflow.artifacts import download_artifacts

    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch(f".{folder.name}", folder.parent) as draft:
        fetched = download_artifacts(artifact_uri=location, dst_path=str(draft), tracking_uri=place)
        Path(fetched).replace(folder)
