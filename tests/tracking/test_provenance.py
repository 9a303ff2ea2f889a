"""A study records the program that made it."""

from __future__ import annotations

import re

import numpy as np

from csmae.tracking.provenance import provenance


def test_provenance_names_the_command_the_versions_and_the_commit() -> None:
    tags = provenance()
    assert f"numpy {np.__version__}" in tags["csmae.versions"]
    assert tags["csmae.command"].startswith("python ")
    if "csmae.git_commit" in tags:
        assert re.fullmatch(r"[0-9a-f]{40}( with changes)?", tags["csmae.git_commit"])
