"""Checkpoints: everything that a training needs to resume as if it had never stopped."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csmae.atomic import atomic_write
from csmae.changes import AFTER_EPOCH
from csmae.config import Config, ConfigError, MayChange, changeable, one_line, with_defaults
from csmae.out_of_memory import is_out_of_memory
from csmae.settings import flatten
from csmae.storage.layout import CHECKPOINT

FORMAT = "csmae-checkpoint-3"


class CheckpointError(ConfigError):
    """A checkpoint is damaged, or belongs to another configuration."""


class FullDiskError(ConfigError):
    """A file of the training cannot be written, whatever its configuration."""


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training is."""

    epochs: int = 0
    """Complete epochs."""
    steps: int = 0
    """Steps done in the epoch that follows them."""
    elapsed_s: float = 0.0
    """Duration of those steps."""
    term_sums: Mapping[str, Tensor] = field(default_factory=dict)
    """Sum of each loss term over those steps, (ranks,)."""


def save_checkpoint(folder: Path, config: Config, progress: TrainingProgress, parts: dict[str, Any]) -> None:
    """Write ``checkpoint.pt``; it replaces the previous one only when it is complete and flushed to the disk.

    Args:
        folder: The run's folder.
        config: Compared when the training resumes.
        progress: Together with ``train.seed`` the whole random state: every step draws from a generator seeded by
            (seed, step), with any number of workers.
        parts: Model, optimizer and gradient scaler, by name.

    Raises:
        OSError, RuntimeError: The disk is full; the previous checkpoint is unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "config": config.model_dump_json(),
        "progress": vars(progress) | {"term_sums": dict(progress.term_sums)},
    }
    content |= {name: part.state_dict() for name, part in parts.items()}
    with atomic_write(folder / CHECKPOINT, durable=True) as file:
        torch.save(content, file)


def load_checkpoint(folder: Path, config: Config, parts: dict[str, Any]) -> TrainingProgress:
    """Restore the state that ``save_checkpoint`` wrote.

    Returns:
        The progress; without a checkpoint in the folder, that of a new training.

    Raises:
        CheckpointError: The file is damaged, or was written for another configuration or by another version.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return TrainingProgress()
    content = _read(path)
    if difference := _difference(content, config, MayChange.ON_TRAINING_RESUME):
        name, before, now = difference
        grows = name in changeable(MayChange.IF_LARGER)
        remedy = f"at least {before}" if grows else "the configuration it was written with"
        raise CheckpointError(
            f"{path}: was written with {name} {before}, the configuration says {now}: use another folder, or {remedy}"
        )
    return _restore(content, parts)


def copy_checkpoint(parent_dir: Path, config: Config, parts: dict[str, Any]) -> TrainingProgress:
    """Restore the state that another training saved; its configuration may differ where ``can_change_in_training``.

    Returns:
        The other training's progress.

    Raises:
        CheckpointError: There is no checkpoint, it is damaged, or the new configuration cannot continue it.
    """
    path = parent_dir / CHECKPOINT
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist: there is no checkpoint to copy")
    content = _read(path)
    if difference := _difference(content, config, MayChange.ON_CHECKPOINT_COPY):
        name, before, now = difference
        raise CheckpointError(
            f"{path}: was written with {name} {before}, the configuration says {now}: a copied checkpoint cannot change it"
        )
    groups = parts["optimizer"].param_groups
    options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    try:
        progress = _restore(content, parts)
    except (RuntimeError, ValueError) as error:  # of torch, which names the parameters
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: the configuration builds other parts of the network ({one_line(error)}): "
            "a copied checkpoint cannot change which loss weights are 0"
        ) from None
    for group, values in zip(parts["optimizer"].param_groups, options, strict=True):
        group |= values  # the checkpoint's were those of the other configuration
    return progress


def _restore(content: dict[str, Any], parts: dict[str, Any]) -> TrainingProgress:
    for name, part in parts.items():
        if content[name]:  # the state of a disabled gradient scaler is empty
            part.load_state_dict(content[name])
    return TrainingProgress(**content["progress"])


def read_progress(folder: Path) -> tuple[int, int]:
    """Complete epochs, and steps of the next one, of a folder's checkpoint; zeros if it has no readable one."""
    try:
        # Memory-mapped: reads no tensor.
        content = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True, mmap=True)
        return int(content["progress"]["epochs"]), int(content["progress"]["steps"])
    except Exception:  # torch, pickle and zip each fail in their own ways; loading the checkpoint explains the error
        return 0, 0


def shorter_training(folder: Path, config: Config) -> tuple[int, int] | None:
    """Return ``train.epochs`` and the trained epochs of a folder's checkpoint; None unless the configuration has more epochs.

    Raises:
        CheckpointError: The checkpoint is damaged, or was written by another version.
    """
    if not (folder / CHECKPOINT).exists():
        return None
    content = _read(folder / CHECKPOINT, mmap=True)
    before = int(json.loads(content["config"])["train"]["epochs"])
    trained = content["progress"]["epochs"] + bool(content["progress"]["steps"])
    return (before, trained) if before < config.train.epochs else None


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        # To the CPU: on the device, the state would be in memory twice while it is copied.
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        version = content["format"]
    except Exception as error:  # torch, pickle and zip each fail in their own ways
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: is damaged ({one_line(error)}): remove it to restart the run") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: was written by another version of csmae: remove it to restart the run")
    return content


def _difference(content: dict[str, Any], config: Config, when: MayChange) -> tuple[str, Any, Any] | None:
    """Return the first field that must not change but does: its name, and its values in the checkpoint and now."""
    before = dict(flatten(with_defaults(json.loads(content["config"]))))
    now, free = dict(flatten(config.model_dump(mode="json"))), changeable(when)
    trained = content["progress"]["epochs"] + bool(content["progress"]["steps"])
    for values in (before, now):  # later changes have had no effect yet
        values["train.changes"] = [
            change for change in values.get("train.changes", ()) if change[AFTER_EPOCH] < trained
        ]
    may_grow = changeable(MayChange.IF_LARGER) - free
    for name, value in now.items():
        grows = name in may_grow and value > before[name]
        if name not in free and before.get(name) != value and not grows:
            return name, before.get(name), value
    return None


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """Compute a checksum of the configuration by which a trial learns.

    Fields that may change while a trial trains are left out, and so are default values, because a later version has more.
    """
    free = changeable(MayChange.ON_TRAINING_RESUME) | changeable(MayChange.IF_LARGER)
    default = dict(flatten(Config().model_dump(mode="json")))
    values = dict(flatten(json.loads(json.dumps(config))))
    learnt = {name: value for name, value in values.items() if name not in free and value != default.get(name)}
    return f"{zlib.crc32(json.dumps(learnt, sort_keys=True).encode()):08x}"
