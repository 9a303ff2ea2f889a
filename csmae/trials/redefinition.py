"""What a study was started as, beside what its file says now."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class PreservedState:
    """What a study keeps when it gets another definition; a file holds it until all of it is in the database again.

    Optuna deletes and creates a study in two steps, and a process may be killed between them.
    """

    attributes: dict[str, Any]
    """User attributes of the study."""
    trials: list[dict[str, Any]]
    """User attributes of its trials, in order of their numbers."""

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        draft = path.with_suffix(".new")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> PreservedState | None:
        """Read the file; None where there is none."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
