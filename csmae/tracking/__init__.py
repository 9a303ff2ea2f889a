"""Experiment tracking: outbox, upload to MLflow or Weights & Biases, model registry."""
