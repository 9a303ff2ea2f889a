"""Names of what a storage folder holds, beside one folder for each study."""

DATABASE = "studies.db"
"""Optuna's database of all studies."""

DATABASES = (DATABASE, "mlflow.db")
"""SQLite keeps files of its own beside each: a study's name must not begin like one."""

RESERVED = ("mlartifacts", "mlruns", "driver.lock")
"""Further names that a study cannot have."""
