"""The command ``train``: one configuration without a search, in one process or under ``torchrun``."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csmae.cli.exit_status import BAD_INPUT, FAILED, INTERRUPTED
from csmae.cli.options import Assignments
from csmae.config import Config, ConfigError
from csmae.settings import load_yaml, merge, parse_assignments, parse_config

if TYPE_CHECKING:
    from csmae.training.trainer import Epoch


def train(
    configuration: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="YAML file with sections of a configuration, such as model.")
    ],
    assignments: Assignments = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the checkpoint and the encoder. Default: runs/by-hand/NAME, with the name of the file.",
        ),
    ] = None,
) -> int:
    """Train one configuration, without a search.

    Under torchrun its processes train together. Ctrl-C stops the training; the same command resumes it from its last
    checkpoint.
    """
    import torch
    import torch.distributed as dist

    from csmae.cpus import usable_cpus
    from csmae.training.micro_batch import SmallerMicroBatchError
    from csmae.training.torchrun import torchrun_process_group
    from csmae.training.trainer import DivergedError

    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    status = 0
    try:
        values = merge(load_yaml(configuration), parse_assignments(assignments or []))
        config = parse_config(values, str(configuration))
        with torchrun_process_group():
            run_epochs(config, output_dir or Path("runs") / "by-hand" / configuration.stem)
    except (ConfigError, DivergedError) as error:
        sys.stderr.write(f"{error}\n")
        status = BAD_INPUT
    except SmallerMicroBatchError as error:
        sys.stderr.write(f"{error}; run the same command again\n")
        status = FAILED
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command to resume from the last checkpoint\n")
        status = INTERRUPTED
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = FAILED
    if dist.is_initialized():
        _exit_without_waiting(status)
    return status


def _exit_without_waiting(status: int) -> None:
    """End this process after an error: the interpreter's own end would wait for ranks that may never answer."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def run_epochs(config: Config, output_dir: Path) -> None:
    """Train with a progress bar and a line for each epoch, both on rank 0."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from csmae.distributed import rank_and_world_size
    from csmae.training.checkpoint import shorter_training
    from csmae.training.optim import describe_growth
    from csmae.training.trainer import pretrain

    is_first = rank_and_world_size()[0] == 0
    console = Console(quiet=not is_first, markup=False, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if shorter := shorter_training(output_dir, config):
        before, trained = shorter
        note = describe_growth(before, config.optim, config.train.epochs, trained)
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    hidden = not (is_first and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        epochs = progress.add_task("epochs", total=config.train.epochs)
        steps = progress.add_task("steps")
        for epoch in pretrain(
            config, output_dir, on_step=lambda done, total: progress.update(steps, completed=done, total=total)
        ):
            progress.update(epochs, completed=epoch.number)
            console.print(_format_epoch(epoch, config.train.epochs), highlight=False)
    console.print(f"encoder: {output_dir / 'encoder'}", highlight=False)


def _format_epoch(epoch: Epoch, num_epochs: int) -> str:
    metrics = epoch.metrics
    line = f"epoch {epoch.number}/{num_epochs}  loss {metrics['train/loss']:.4f}"
    if "val/f1_mean" in metrics:
        line += f"  F1 {metrics['val/f1_mean']:.4f}  partner {metrics['val/recall_at_1']:.4f}"
    return f"{line}  {metrics['train/pairs_per_s']:.0f} pairs/s"
