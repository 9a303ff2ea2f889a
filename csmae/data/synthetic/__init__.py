"""The synthetic archive: scenes drawn from land-cover classes."""
