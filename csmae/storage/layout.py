"""Names in a storage folder and in the folder of a study."""

from pathlib import Path

from csmae.lock import DRIVER_LOCK

CHECKPOINT = "checkpoint.pt"
"""State from which a trial resumes, in the trial's folder."""

DATABASE = "studies.db"
"""Optuna's database of all studies."""

DATABASES = (DATABASE, "mlflow.db")
"""SQLite keeps further files beside each; a study's name must not begin with one of these names."""

RESERVED = ("mlartifacts", "mlruns", DRIVER_LOCK)
"""Further names that a study cannot have."""


def trial_dir(study_dir: Path, number: int) -> Path:
    """The folder of a trial, in the folder of its study."""
    return study_dir / "trials" / str(number)
