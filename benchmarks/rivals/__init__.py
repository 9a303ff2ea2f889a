"""Other projects' search methods in the protocol of ``search_curves.py``, each run from its own environment: `make rivals`."""
