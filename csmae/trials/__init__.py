"""The trial store: every trial of a study in Optuna's database, and what is read from it; no Ray."""
