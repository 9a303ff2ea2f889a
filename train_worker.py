"""Train one configuration by hand: ``python train_worker.py run.yaml``, or the same under ``torchrun``."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.rendezvous import rendezvous

from csmae.config import Config, ConfigError
from csmae.console.terminal import tolerate_closed_terminal, tolerate_encoding_errors
from csmae.cpus import usable_cpus
from csmae.settings import load_yaml, merge, parse_assignments, parse_config
from csmae.training.micro_batch import SmallerMicroBatchError
from csmae.training.trainer import DivergedError, Epoch, pretrain

JOIN_S = 300.0
"""In which all processes of a training must have found each other."""

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""

MAX_PORT = 65535

ALONE = "start all processes with torchrun, or unset RANK to train in this process alone"


def run() -> NoReturn:
    """Run the command line and end the process.

    After an error nothing waits for the other ranks. Destroying or aborting the process group, and the interpreter's own
    end, would: they wait until collectives that were started are done, and the others may never join these
    (``torch.distributed.destroy_process_group`` calls ``shutdown`` of each backend).
    """
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="YAML file with the sections of a configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as masking.ratio=0.6")
    parser.add_argument("--out", type=Path, help="folder for checkpoint and encoder (default: runs/by-hand/<name>)")
    return parser


@tolerate_encoding_errors()
@tolerate_closed_terminal()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    try:
        values = merge(load_yaml(options.run), parse_assignments(options.set))
        config = parse_config(values, str(options.run))
        with process_group():
            train(config, options.out or Path("runs") / "by-hand" / options.run.stem)
    except (ConfigError, DivergedError) as error:
        print(error, file=sys.stderr)
        return 2
    except SmallerMicroBatchError as error:
        print(f"{error}; run the same command again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command to resume from the last checkpoint", file=sys.stderr)
        return 130
    return 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started; a process by itself joins none. After an error the group stays, see ``run``."""
    if "RANK" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available()
    store, rank, world_size = _meet(cuda)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()


def _meet(cuda: bool) -> tuple[Any, int, int]:
    """Find the other processes; returns what they share, this one's rank and their number.

    Raises:
        ConfigError: The environment does not say what torchrun says, or the others cannot be found.
    """
    if missing := [name for name in (*LAUNCHER, *(["LOCAL_RANK"] * cuda)) if not os.environ.get(name)]:
        raise ConfigError(f"RANK is set in the environment, but {' and '.join(missing)} is not: {ALONE}")
    world_size = _number("WORLD_SIZE", 1)
    rank, port = _number("RANK", 0, world_size - 1), _number("MASTER_PORT", 0, MAX_PORT)
    if cuda:
        _number("LOCAL_RANK", 0, torch.cuda.device_count() - 1)
    host = os.environ["MASTER_ADDR"]
    try:
        if rank:
            _wait_for(host, port)
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
    except (
        ValueError,
        OverflowError,
        OSError,
        RuntimeError,
    ) as error:  # no such host; nobody answers, in torch's words
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"rank {rank} of {world_size} has not met the others at {host}:{port} (MASTER_ADDR, "
            f"MASTER_PORT) within {JOIN_S:.0f} s: {reason}: {ALONE}"
        ) from None
    return store, rank, world_size


def _number(name: str, least: int, most: int | None = None) -> int:
    """An integer of the environment.

    Raises:
        ConfigError: It is not an integer, or out of range.
    """
    text = os.environ[name]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least or (most is not None and number > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{name} is {text!r} in the environment, not an integer {wanted}: {ALONE}")
    return number


def _wait_for(host: str, port: int) -> None:
    """Wait until rank 0 listens; torch would wait, too, and print its stack at the end.

    Raises:
        OSError: It does not.
    """
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((host, port), JOIN_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def train(config: Config, out: Path) -> None:
    """Train with a progress bar on rank 0."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(quiet=not first, markup=False, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (first and console.is_terminal)) as progress:
        epochs = progress.add_task("epochs", total=config.train.epochs)
        steps = progress.add_task("steps")
        for epoch in pretrain(
            config, out, on_step=lambda done, total: progress.update(steps, completed=done, total=total)
        ):
            progress.update(epochs, completed=epoch.number)
            console.print(summary(epoch, config.train.epochs), highlight=False)
    console.print(f"encoder: {out / 'encoder'}", highlight=False)


def summary(epoch: Epoch, num_epochs: int) -> str:
    """One line about an epoch."""
    metrics = epoch.metrics
    line = f"epoch {epoch.number}/{num_epochs}  loss {metrics['train/loss']:.4f}"
    if "val/f1_mean" in metrics:
        line += f"  F1 {metrics['val/f1_mean']:.4f}  partner {metrics['val/recall_at_1']:.4f}"
    return f"{line}  {metrics['train/pairs_per_s']:.0f} pairs/s"


if __name__ == "__main__":
    run()
