"""Settings of MLflow: no telemetry, no info messages, short timeouts. Must be set before MLflow is imported."""

from __future__ import annotations

import logging
import os

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the uploader retries; a repeated POST would create a second run
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def quiet_mlflow() -> None:
    """Set what the user has not set in the environment."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)  # hides the creation of tables
