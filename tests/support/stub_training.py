"""Trainings that take no time, for tests of what surrounds a training; a worker group gets them as ``stub_training:…``."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from csmae.config import Config, ConfigError
from csmae.training.checkpoint import FullDiskError
from csmae.training.trainer import DivergedError, Epoch, pretrain

OnStep = Callable[[int, int], bool | None]


def quick(
    config: Config,
    run_dir: Path,
    device: str,
    on_step: OnStep,
    until: int | None = None,
    parent_dir: Path | None = None,
) -> Iterator[Epoch]:
    """Epochs of a score that grows toward ``masking.ratio``; resumes from ``run_dir/epoch``, or from its parent's.

    ``run_dir/../../faults.json`` maps trial numbers to faults, see ``_inject_fault``.
    """
    rank, state = dist.get_rank(), run_dir / "epoch"
    run_dir.mkdir(parents=True, exist_ok=True)
    saved = [path for path in (state, parent_dir and parent_dir / "epoch") if path and path.exists()]
    done = int(saved[0].read_text()) if saved else 0
    with (run_dir / f"pids-{rank}").open("a") as file:
        file.write(f"{os.getpid()} from {done}\n")
    for epoch in range(done + 1, (until or config.train.epochs) + 1):
        time.sleep(0.02)
        _inject_fault(run_dir, rank, epoch)
        dist.all_reduce(torch.ones(1))
        if rank == 0:
            state.write_text(str(epoch))
        dist.barrier()
        yield Epoch(epoch, {"val/f1_mean": config.masking.ratio * (1 - 0.5**epoch), "train/loss": 1 / epoch})


def out_of_memory(
    config: Config,
    run_dir: Path,
    device: str,
    on_step: OnStep,
    until: int | None = None,
    parent_dir: Path | None = None,
) -> Iterator[Epoch]:
    """A real training in which rank 1 has memory for one pair."""
    import pytest

    from tests.training.test_training import limit_memory

    rank = dist.get_rank()
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / f"pids-{rank}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            limit_memory(patch, 1)
        yield from pretrain(config, run_dir, device, on_step, until, parent_dir)


def killed_before_its_pause_is_reported(
    config: Config,
    run_dir: Path,
    device: str,
    on_step: OnStep,
    until: int | None = None,
    parent_dir: Path | None = None,
) -> Iterator[Epoch]:
    """A real training whose worker is killed once after the last epoch of each assignment, which is saved."""
    for epoch in pretrain(config, run_dir, device, on_step, until, parent_dir):
        mark = run_dir / f"killed-{epoch.number}"
        if epoch.number == until and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield epoch


def _inject_fault(run_dir: Path, rank: int, epoch: int) -> None:
    """Inject this trial's fault in ``faults.json``: ``[what, epoch, rank, times]``."""
    path = run_dir.parent.parent / "faults.json"
    faults = json.loads(path.read_text()) if path.exists() else {}
    what, at, who, times = faults.get(run_dir.name, ("nothing", 0, 0, 0))
    if epoch != at:
        return
    if what == "fill" and len(list(run_dir.glob("full-*"))) < 2 * times:
        (run_dir / f"full-{rank}-{time.time_ns()}").touch()
        raise FullDiskError("the disk is full, say")
    if what == "diverge":
        raise DivergedError(f"the loss is not finite in epoch {epoch}")
    if rank != who or len(list(run_dir.glob("fault-*"))) >= times:
        return
    (run_dir / f"fault-{time.time_ns()}").touch()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill trainable":
        _kill("ray::ResourceTrainable")
    if what == "kill controller":
        _kill("ray::TrainController")
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "refuse":
        raise ConfigError("a damaged archive, say")
    if what == "raise":
        raise RuntimeError("out of memory, say")
    if what == "hang":
        time.sleep(3600)


def _kill(name: str) -> None:
    """Kill the processes of this node's raylet whose title starts with a name, and wait to be killed."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == os.getppid() and (stat.parent / "cmdline").read_text().startswith(name):
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue
    time.sleep(3600)
