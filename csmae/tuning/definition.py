"""What a study was started as, beside what its file says now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from csmae.config import ANY_RUN, completed, may_change
from csmae.settings import flatten


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What changed between two definitions that makes another study of it, one text a name.

    Args:
        before: As written, perhaps by an earlier version: fields that it lacks have their defaults.
        now: Of the study's file.
    """
    old = dict(flatten({**before, "base": completed(before["base"])}))
    new = dict(flatten(json.loads(json.dumps(now))))
    free = {f"base.{name}" for name in may_change(ANY_RUN)}
    for name in [*old, *(name for name in new if name not in old)]:
        if old.get(name) != new.get(name) and name not in free:
            yield f"{name} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"
