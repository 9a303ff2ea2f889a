"""Sensor-agnostic image retrieval: embed an archive, search it, score the results."""
