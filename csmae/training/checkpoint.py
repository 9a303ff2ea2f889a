"""What a training needs to go on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csmae.atomic import atomic_write
from csmae.config import Config, ConfigError, MayChange, changeable, completed
from csmae.out_of_memory import is_out_of_memory
from csmae.settings import flatten

CHECKPOINT = "checkpoint.pt"

FORMAT = "csmae-checkpoint-2"


class CheckpointError(ConfigError):
    """A checkpoint that is damaged, or belongs to another configuration."""


class FullDiskError(ConfigError):
    """What a training must write cannot be written; no fault of its configuration."""


@dataclass(frozen=True)
class Done:
    """How far a training is."""

    epochs: int = 0
    """Whole epochs."""
    steps: int = 0
    """Steps of the epoch after them."""
    seconds: float = 0.0
    """That those steps took."""
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the loss terms over those steps, (ranks,) each."""


def save_checkpoint(folder: Path, config: Config, done: Done, parts: dict[str, Any]) -> None:
    """Write ``checkpoint.pt`` under a temporary name, flush it to the disk, and rename it.

    Args:
        folder: The run's folder.
        config: Compared when resuming.
        done: With ``train.seed`` it is the whole state of the randomness: every step draws from a generator seeded by
            (seed, step), on any number of workers.
        parts: State of the model, optimiser and gradient scaler, by name.

    Raises:
        OSError, RuntimeError: The disk is full; the file that was there before still is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {"format": FORMAT, "config": config.model_dump_json(), "done": vars(done) | {"sums": dict(done.sums)}}
    with atomic_write(folder / CHECKPOINT, durable=True) as file:
        torch.save(content | states, file)


def load_checkpoint(folder: Path, config: Config, parts: dict[str, Any]) -> Done:
    """Restore what ``save_checkpoint`` wrote.

    Returns:
        How far it is; nothing where the folder has no checkpoint.

    Raises:
        CheckpointError: The file is damaged or was written for another configuration.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Done()
    try:
        # Not on the device: while its parts are copied there would be everything twice.
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: is not a checkpoint of this version: remove it to restart the run")
    except CheckpointError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A damaged file fails in any of torch's, pickle's or zip's ways.
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: is damaged ({reason}): remove it to restart the run") from None
    _compare(path, json.loads(content["config"]), config)
    for name, part in parts.items():
        if content[name]:  # a gradient scaler that was off leaves nothing
            part.load_state_dict(content[name])
    return Done(**content["done"])


def progress(folder: Path) -> tuple[int, int]:
    """Epochs that a folder's checkpoint has done, and steps of the next; none where there is no whole checkpoint."""
    path = folder / CHECKPOINT
    try:
        done = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["done"]  # reads no tensor
        return int(done["epochs"]), int(done["steps"])
    except Exception:  # a damaged file fails in any of torch's, pickle's or zip's ways; resuming names what is wrong
        return 0, 0


def _compare(path: Path, written: dict[str, Any], config: Config) -> None:
    before, now = dict(flatten(completed(written))), dict(flatten(config.model_dump(mode="json")))
    free = changeable(MayChange.IN_TRAINING)
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            raise CheckpointError(
                f"{path}: was written with {name} {before.get(name)}, the configuration says {value}: "
                "use another folder, or the configuration it was written with"
            )
