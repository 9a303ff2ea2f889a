"""The retrieving room: feature stores, queries, and the commands that people search archives with."""
