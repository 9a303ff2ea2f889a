"""Joining the processes that ``torchrun`` started, before a training that Ray does not run."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from csmae.config import ConfigError, one_line

JOIN_TIMEOUT_S = 300.0
"""Time in which all processes of a training must join."""

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets in each process."""

MAX_PORT = 65535

REMEDY = "start all processes with torchrun, or unset RANK to train in this process alone"


@contextmanager
def torchrun_process_group() -> Iterator[None]:
    """Join the process group of torchrun; without RANK in the environment there is none to join.

    After an error the group stays: destroying it waits until the collectives that were started are done, and other ranks may
    never join these (``torch.distributed.destroy_process_group`` calls ``shutdown`` of each backend).

    Raises:
        ConfigError: The environment is not that of torchrun, or another process does not join.
    """
    if "RANK" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available()
    store, rank, world_size = _rendezvous(cuda)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    yield
    dist.destroy_process_group()


def _rendezvous(cuda: bool) -> tuple[Any, int, int]:
    """Meet the other processes; returns the shared store, this process's rank and the number of ranks."""
    if missing := [name for name in (*VARIABLES, *(["LOCAL_RANK"] * cuda)) if not os.environ.get(name)]:
        raise ConfigError(f"RANK is set in the environment, but {' and '.join(missing)} is not: {REMEDY}")
    world_size = _read_integer("WORLD_SIZE", 1)
    rank, port = _read_integer("RANK", 0, world_size - 1), _read_integer("MASTER_PORT", 0, MAX_PORT)
    if cuda:
        _read_integer("LOCAL_RANK", 0, torch.cuda.device_count() - 1)
    host = os.environ["MASTER_ADDR"]
    try:
        if rank:
            _wait_for(host, port)
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT_S)))
    except (ValueError, OverflowError, OSError, RuntimeError) as error:  # an unknown host, or torch's own timeout
        raise ConfigError(
            f"rank {rank} of {world_size} has not met the others at {host}:{port} (MASTER_ADDR, "
            f"MASTER_PORT) within {JOIN_TIMEOUT_S:.0f} s: {one_line(error)}: {REMEDY}"
        ) from None
    return store, rank, world_size


def _read_integer(name: str, least: int, most: int | None = None) -> int:
    """Read an environment variable.

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
        raise ConfigError(f"{name} is {text!r} in the environment, not an integer {wanted}: {REMEDY}")
    return number


def _wait_for(host: str, port: int) -> None:
    """Wait until rank 0 listens. Torch would wait as well, but print its stack at a timeout.

    Raises:
        OSError: Rank 0 does not listen in time.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, port), JOIN_TIMEOUT_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
