"""Fetches an encoder from MLflow: from its URI to a folder with its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from csmae.scratch import scratch
from csmae.sqlite import sqlite_path, sqlite_url
from csmae.tracking.destination import explain, redacted
from csmae.tracking.mlflow_database import check_not_empty, moved_locations, open_client, translate
from csmae.tracking.outbox import TrackingError
from csmae.tracking.registry import ALIAS, CHECKSUM, MODEL, checksum

DEFAULT_DATABASE = Path("runs/mlflow.db")
"""Where encoders are looked up without MLFLOW_TRACKING_URI."""


def fetch_encoder(uri: str, tracking_uri: str | None = None) -> Path:
    """Fetch an encoder from MLflow and verify its checksum.

    Args:
        uri: ``models:/csmae-encoder@champion``, ``models:/csmae-encoder/3``, ``models:/m-<logged model id>`` or
            ``runs:/<run id>``.
        tracking_uri: By default ``MLFLOW_TRACKING_URI``, or ``runs/mlflow.db`` if it exists.

    Returns:
        A folder that holds ``encoder.safetensors`` and ``config.json``: MLflow's own or a cache, so do not change it.

    Raises:
        TrackingError: There is no server or no such encoder, or the files are not the registered ones.
    """
    tracking_uri = tracking_uri or _default_uri()
    database = sqlite_path(tracking_uri)
    try:
        if database:
            check_not_empty(database)
        location, sha256 = _find(open_client(tracking_uri), uri)
        location = translate(location, moved_locations(database)) if database else location
        folder = _local_folder(location, sha256, tracking_uri)
    except TrackingError as error:
        raise TrackingError(str(error) if str(error).startswith(uri) else f"{uri}: {error}") from None
    except Exception as error:  # a broken server or database can fail in any way
        raise TrackingError(f"{uri}: {redacted(tracking_uri)}: {explain(error)}") from None
    if checksum(folder) != sha256:
        raise TrackingError(
            f"{uri}: {folder} does not hold the files that were registered: its checksum differs: restore it, or load another version"
        )
    return folder


def _default_uri() -> str:
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if DEFAULT_DATABASE.exists():
        # An absolute path: MLflow caches a store by its URI, whatever the current folder is.
        return sqlite_url(DEFAULT_DATABASE.absolute())
    raise TrackingError(
        f"no MLflow server: set MLFLOW_TRACKING_URI, or run in the folder that holds {DEFAULT_DATABASE}"
    )


def _find(client: Any, uri: str) -> tuple[str, str]:
    """Look up the location of an encoder's files, and their checksum."""
    scheme, _, name = uri.partition(":/")
    name = name.strip("/")
    if scheme == "runs" and name:
        models = client.search_logged_models([client.get_run(name).info.experiment_id], f"source_run_id = '{name}'")
        if not models:
            raise TrackingError(f"{uri}: this run has no encoder: only the best trials and the champion have one")
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


def _local_folder(location: str, sha256: str, tracking_uri: str) -> Path:
    """The files' own folder if this machine has it, otherwise a cache to which they are downloaded once."""
    url = urlparse(location)
    if url.scheme in ("", "file"):
        return Path(unquote(url.path))
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "csmae" / (sha256 or "unknown")
    if not cache.exists():
        _download(location, cache, tracking_uri)
    return cache


def _download(location: str, folder: Path, tracking_uri: str) -> None:
    from mlflow.artifacts import download_artifacts

    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch(f".{folder.name}", folder.parent) as draft:
        fetched = download_artifacts(artifact_uri=location, dst_path=str(draft), tracking_uri=tracking_uri)
        Path(fetched).replace(folder)
