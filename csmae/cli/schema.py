"""The command ``schema``."""

from __future__ import annotations

import json

from csmae.console.terminal import print_line


def schema() -> int:
    """Print the JSON schema of a study file, for editors that complete and check YAML."""
    from csmae.study.schema import study_schema

    print_line(json.dumps(study_schema(), indent=2))
    return 0
