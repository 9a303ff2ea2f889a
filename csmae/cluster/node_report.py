"""Collects a report from each node of a cluster: versions, token, GPUs, disks, storage, data and clock."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from csmae.config import ConfigError, Data, one_line
from csmae.storage.object_store import ObjectStore
from csmae.storage.probe import StorageProbe, storage_probe

REPORT_TIMEOUT_S = 180.0
"""Time that all nodes have to report: a process must start, and perhaps import torch from a slow disk."""

CUDA_PROBE = "import torch; torch.cuda.init(); print(torch.cuda.device_count())"


@dataclass(frozen=True)
class NodeReport:
    """What a process found on its machine; the last two fields are the driver's view of it."""

    versions: dict[str, str]
    """Versions that must match on every node."""
    token_mode: str
    """Mode of the token's file such as ``0600``; ``environment`` where a variable holds the token; ``none``."""
    gpus: tuple[str, ...]
    """Names and drivers, as ``nvidia-smi`` lists them."""
    cuda_error: str | None
    """Why torch cannot use the GPUs."""
    disks: dict[str, tuple[int, float]]
    """By folder, free bytes and the used share of its disk."""
    storage_error: str | None
    """Why the node does not share the storage."""
    data: str | None
    """The archive's fingerprint."""
    data_error: str | None
    """Why the archive cannot be opened."""
    clock: float
    """Seconds since 1970."""
    clock_offset_s: float = 0.0
    """The clock minus the driver's."""
    ray_gpus: int = 0
    """GPUs that Ray schedules there."""


@dataclass(frozen=True)
class Node:
    """A node and its report."""

    name: str
    report: NodeReport | None
    error: str
    """Why there is no report."""


@dataclass(frozen=True)
class ClusterReport:
    """Reports of the driver's machine and of all nodes."""

    driver: NodeReport
    nodes: list[Node]


def report_nodes(storage: ObjectStore, data: Data | None) -> ClusterReport:
    """Collect a report from every node of the connected Ray.

    Args:
        storage: Must be shared by all nodes.
        data: Archive that all nodes must be able to open; None opens none.
    """
    with storage_probe(storage) as (probe, driver_error):
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        node_ids = {_start_report(node_id, probe, data): node_id for node_id in alive}
        names = _names(alive)
        nodes = []
        # All reports first: reading the storage in between would distort the clock offsets.
        for node_id, report, error, received_at in list(_collect(node_ids)):
            if report:
                report = replace(
                    report,
                    storage_error=_storage_error(report, probe, node_id, driver_error),
                    clock_offset_s=report.clock - received_at,
                    ray_gpus=int(alive[node_id]["Resources"].get("GPU", 0)),
                )
            nodes.append(Node(names[node_id], report, error))
        driver = report_this_node(probe, "driver again", data)
    return ClusterReport(driver, sorted(nodes, key=lambda node: node.name))


def _start_report(node_id: str, probe: StorageProbe, data: Data | None) -> Any:
    """Start ``report_this_node`` on a node; returns the reference to its result."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(report_this_node)
    return task.remote(probe, node_id, data)


def _collect(node_ids: dict[Any, str]) -> Iterator[tuple[str, NodeReport | None, str, float]]:
    """Wait for the results; yields each node's id, its report or the error, and when that arrived."""
    pending, deadline = list(node_ids), time.monotonic() + REPORT_TIMEOUT_S
    while pending and time.monotonic() < deadline:
        done, pending = ray.wait(pending, timeout=deadline - time.monotonic())
        received_at = time.time()
        for reference in done:
            try:
                yield node_ids[reference], ray.get(reference), "", received_at
            except Exception as error:  # a node with another version of Ray or of this program can raise anything
                text = one_line(getattr(error, "cause", None) or error, None)[-200:]
                yield node_ids[reference], None, text, received_at
    for reference in pending:
        ray.cancel(reference, force=True)
        yield node_ids[reference], None, f"did not answer within {REPORT_TIMEOUT_S:.0f} s", time.time()


def _names(nodes: dict[str, Any]) -> dict[str, str]:
    """Addresses by node id; where several nodes have the same address, with the start of the id."""
    addresses = {node_id: str(node["NodeManagerAddress"]) for node_id, node in nodes.items()}
    all_names = list(addresses.values())
    return {i: name if all_names.count(name) == 1 else f"{name} ({i[:6]})" for i, name in addresses.items()}


def _storage_error(report: NodeReport, probe: StorageProbe, node_id: str, driver_error: str | None) -> str | None:
    """Why driver and node do not share the storage, seen from both sides."""
    if driver_error or report.storage_error:
        return driver_error or report.storage_error
    return None if probe.can_read(node_id) else f"the driver does not see what it writes to {probe.store.url}"


def report_this_node(probe: StorageProbe, name: str, data: Data | None) -> NodeReport:
    """Report what this process finds on its machine.

    Args:
        probe: Written by the driver.
        name: Of this node's answer in the storage.
        data: Archive to open.
    """
    fingerprint, data_error = _open(data) if data else (None, None)
    gpus, temporary = _gpus(), Path(tempfile.gettempdir())
    folders = [folder for folder in (probe.store.folder, temporary) if folder]
    return NodeReport(
        versions=versions(),
        token_mode=_token_mode(),
        gpus=gpus,
        cuda_error=_cuda_error() if gpus else None,
        disks={str(folder): _disk_usage(folder) for folder in folders},
        storage_error=probe.respond(name),
        data=fingerprint,
        data_error=data_error,
        clock=time.time(),
    )


def versions() -> dict[str, str]:
    """Versions of Python, Ray, torch and this program, the latter with a checksum over its source files."""
    import torch

    import csmae

    checksum = 0
    for path in sorted(Path(csmae.__file__).parent.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    own = f"{csmae.__version__}-{checksum:08x}"
    return {"python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__, "csmae": own}


def _token_mode() -> str:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "environment"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return f"{stat.S_IMODE(path.stat().st_mode):04o}"
    except OSError:
        return "none"


def _gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return tuple(line.replace(", ", " driver ", 1) for line in lines)


def _cuda_error() -> str | None:
    """Initialize CUDA in a process that sees all GPUs: Ray hides them from tasks that request none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", CUDA_PROBE], env=environment, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1][:160]


def _disk_usage(folder: Path) -> tuple[int, float]:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(existing)
    return usage.free, usage.used / max(1, usage.used + usage.free)


def _open(data: Data) -> tuple[str | None, str | None]:
    """The archive's fingerprint, or why it cannot be opened."""
    from csmae.data.archive import fingerprint

    try:
        return fingerprint(data), None
    except ConfigError as error:
        return None, str(error).splitlines()[0]
