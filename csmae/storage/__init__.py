"""Storage of studies in an object store."""
