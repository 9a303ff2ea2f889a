"""The trial store: every trial of a study in Optuna's database, and what is read off it; no Ray."""
