"""Searches on tables of learning curves under a simulated clock. Needs only numpy, so that rivals' environments can import it."""
