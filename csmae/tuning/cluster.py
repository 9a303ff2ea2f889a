"""Ray for a search: a quiet one of our own on this machine, or a cluster that is there; and what fits on it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import ray
from ray._private.state import state

from csmae.config import ConfigError
from csmae.tuning.door import enter, find, have_token
from csmae.tuning.options import Search
from csmae.tuning.reaper import orphans_freed

OBJECT_STORE_BYTES = 256 * 2**20
"""Enough for what a search puts there: nothing of size passes through Ray."""

ACCELERATOR = "accelerator_type:"
"""How Ray calls the resource of a node that has a type of accelerator."""

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output cannot be silenced
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative data.path means the same in every process
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # how soon a dead worker is noticed
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",  # slots that start at a time; the searcher knows how many there may be
    "TUNE_GLOBAL_CHECKPOINT_S": "31536000",  # Tune's own snapshots are not used, and grow with the trials
}

OWN_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away from itself
    "OMP_NUM_THREADS": "1",  # each worker sets its own number of threads
}


@dataclass(frozen=True)
class Room:
    """CPUs and GPUs that a search may use."""

    cpus: float
    gpus: float
    where: str
    cpus_per_gpu: float | None = None
    """The fewest CPUs that a node has for each of its GPUs; None where all is one node."""
    asks_for_token: bool = True
    """Whether strangers are kept out."""
    kinds: Mapping[str, Room] = field(default_factory=dict)
    """By Ray's type of accelerator, what the nodes have that bear it."""


@dataclass(frozen=True)
class Share:
    """What fits: how many trials at a time, and what each of their workers gets."""

    slots: int
    cpus_per_worker: float
    gpus_per_worker: float
    accelerator_type: str | None = None


def this_machine() -> Room:
    """What this machine has, as this process may use it."""
    import torch

    return Room(len(os.sched_getaffinity(0)), torch.cuda.device_count(), "this machine")


def share(search: Search, room: Room) -> Share:
    """Divide the room into slots of ``workers_per_trial`` workers.

    Raises:
        ConfigError: Not even one trial fits, or workers of one trial would share a GPU.
    """
    workers, kind = search.workers_per_trial, search.accelerator_type
    if kind:
        if kind not in room.kinds:
            found = ", ".join(sorted(room.kinds)) or "none that Ray knows"
            raise ConfigError(
                f"search.accelerator_type {kind}: the accelerators of {room.where} are: {found}: name one of them, or none"
            )
        room = room.kinds[kind]
    gpus = search.gpus_per_worker if search.gpus_per_worker is not None else float(room.gpus > 0)
    if 0 < gpus < 1 and workers > 1:
        raise ConfigError(
            f"search.gpus_per_worker must be whole where a trial has {workers} workers: found {gpus:g}; "
            "two workers of one trial cannot share a GPU"
        )
    needs = [("CPUs", 1.0, room.cpus)] + ([("GPUs", gpus, room.gpus)] if gpus else [])
    for name, each, there in needs:
        if workers * each > there:
            raise ConfigError(
                f"search.workers_per_trial {workers} needs {workers * each:g} {name}, {room.where} has {there:g}: "
                "lower --workers-per-trial or --gpus-per-worker"
            )
    slots = int(min(there // (workers * each) for _, each, there in needs))
    per_gpu = room.cpus_per_gpu or room.cpus / max(room.gpus, 1)
    cpus = max(1.0, gpus * per_gpu // 1) if gpus else 1.0
    return Share(min(slots, search.num_trials), cpus, gpus, kind)


@contextmanager
def ray_running(address: str | None, room: Room | None, verbose: bool, insecure: bool = False) -> Iterator[Room]:
    """Ray for as long as the block lasts.

    Args:
        address: Of a cluster to join; None starts one here that ends with the block.
        room: What the Ray of our own may use; None where one is joined.
        verbose: Whether Ray may speak.
        insecure: Whether to join a cluster that asks nobody for a token.

    Yields:
        What Ray has.

    Raises:
        ConfigError: There is no cluster at the address, it does not let us in, or it lets everybody in.
    """
    os.environ.update(SETTINGS if address else SETTINGS | OWN_SETTINGS)
    level = logging.INFO if verbose else logging.CRITICAL
    quiet = {"logging_level": level, "log_to_driver": verbose}
    if not verbose:
        _hush()
    there = find(address) if address else None
    asks = enter(there, insecure) if there else True
    try:
        if there:
            ray.init(address=there, **quiet)
        else:
            assert room is not None
            have_token()
            ray.init(
                num_cpus=int(room.cpus),
                num_gpus=int(room.gpus),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except Exception as error:  # Ray raises what it likes, bare Exception where a node does not come up in time
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"Ray {'at ' + address if address else 'on this machine'} cannot be used: {reason}") from None
    try:
        with orphans_freed():  # after the trials, too: what the last of them left would be missing for the scoring
            room = room_there(f"the cluster at {address}" if address else "this machine")
            yield replace(room, asks_for_token=asks)
    finally:
        ray.shutdown()


def room_there(where: str) -> Room:
    """What the Ray that runs has at the moment, without nodes that will be taken away.

    Args:
        where: Names it in errors.
    """
    going = state.get_draining_nodes()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    types = sorted({key for node in nodes for key in node if key.startswith(ACCELERATOR)})
    kinds = {
        key.removeprefix(ACCELERATOR): _sum([node for node in nodes if key in node], f"{where}, with {key},")
        for key in types
    }
    return replace(_sum(nodes, where), kinds=kinds)


def _sum(nodes: list[Mapping[str, float]], where: str) -> Room:
    per_gpu = min((node.get("CPU", 0) / node["GPU"] for node in nodes if node.get("GPU")), default=None)
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    return Room(cpus, gpus, where, per_gpu)


def _hush() -> None:
    """Keep the loggers and warnings of the engines from the terminal; errors of ours come as exceptions."""
    ray._private.worker._worker_logs_enabled = False  # what the raylet prints when a worker dies is told in our words
    warnings.filterwarnings("ignore", module="ray")
    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
