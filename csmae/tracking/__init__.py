"""The tracking room: outbox, MLflow, registry, pictures and reports."""
