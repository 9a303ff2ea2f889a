"""CSMAE search: cross-sensor masked autoencoders, explored on Ray, tracked in MLflow."""
