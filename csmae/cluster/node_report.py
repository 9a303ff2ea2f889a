"""What each node of a cluster has and sees, as a process on it finds out."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from csmae.config import ConfigError, Data
from csmae.storage.object_store import ObjectStore
from csmae.storage.probe import StorageProbe, storage_probe

ANSWER_S = 180.0
"""For all nodes to answer: a process must start, and import torch perhaps from a slow disk."""

CUDA = "import torch; torch.cuda.init(); print(torch.cuda.device_count())"


@dataclass(frozen=True)
class NodeReport:
    """What a process found on its machine."""

    versions: dict[str, str]
    """Of what must be the same everywhere."""
    token: str
    """Mode of the token's file such as ``0600``, ``environment`` where that holds the token, ``none``."""
    gpus: tuple[str, ...]
    """Names and drivers, as ``nvidia-smi`` lists them."""
    cuda: str | None
    """Why torch cannot use them."""
    disks: dict[str, tuple[int, float]]
    """By folder, free bytes and the share that is used."""
    storage: str | None
    """What is wrong with the storage folder."""
    data: str | None
    """The archive's fingerprint."""
    data_trouble: str | None
    """Why it has none."""
    clock: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Node:
    """A node as the driver sees it."""

    name: str
    ray_gpus: int
    """That Ray hands out there."""
    facts: NodeReport | None
    trouble: str
    """Why there are no facts."""
    ahead_s: float = 0.0
    """Its clock before the driver's."""


@dataclass(frozen=True)
class ClusterReport:
    """The driver's machine and all nodes."""

    driver: NodeReport
    nodes: list[Node]


def report_nodes(storage: Path | ObjectStore, data: Data | None) -> ClusterReport:
    """Look at all nodes of the Ray that runs.

    Args:
        storage: What all must share.
        data: The archive that all must read; None looks at none.
    """
    with storage_probe(storage.absolute() if isinstance(storage, Path) else storage) as (place, trouble):
        there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        asked = {_ask(node_id, place, data): node_id for node_id in there}
        answers = dict(_answers(asked))
        names = _names(there)
        nodes = []
        for node_id, (facts, text, received) in answers.items():
            gpus = int(there[node_id]["Resources"].get("GPU", 0))
            ahead = facts.clock - received if facts else 0.0
            nodes.append(Node(names[node_id], gpus, _heard(facts, place, node_id, trouble), text, ahead))
        driver = look(place, "driver again", data)
    return ClusterReport(driver, sorted(nodes, key=lambda node: node.name))


def _ask(node_id: str, place: StorageProbe, data: Data | None) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(look)
    return task.remote(place, node_id, data)


def _answers(asked: dict[Any, str]) -> Iterator[tuple[str, tuple[NodeReport | None, str, float]]]:
    """For each node: its facts, or why there are none, and when they came."""
    open_, deadline = list(asked), time.monotonic() + ANSWER_S
    while open_ and time.monotonic() < deadline:
        done, open_ = ray.wait(open_, timeout=deadline - time.monotonic())
        received = time.time()
        for reference in done:
            try:
                yield asked[reference], (ray.get(reference), "", received)
            except Exception as error:  # a node of another version fails in any way
                text = " ".join(str(getattr(error, "cause", None) or error).split())[-200:]
                yield asked[reference], (None, text, received)
    for reference in open_:
        ray.cancel(reference, force=True)
        yield asked[reference], (None, f"gives no answer within {ANSWER_S:.0f} s", time.time())


def _names(there: dict[str, Any]) -> dict[str, str]:
    """Addresses; with a part of the id where several nodes have one address."""
    addresses = {node_id: str(node["NodeManagerAddress"]) for node_id, node in there.items()}
    seen = list(addresses.values())
    return {i: name if seen.count(name) == 1 else f"{name} ({i[:6]})" for i, name in addresses.items()}


def _heard(facts: NodeReport | None, place: StorageProbe, node_id: str, trouble: str | None) -> NodeReport | None:
    """The facts, with what is wrong with the storage as the driver sees it."""
    if facts is None:
        return None
    if not (trouble or facts.storage or place.can_read(node_id)):
        trouble = f"what it writes to {place} does not come to the driver"
    return NodeReport(**vars(facts) | {"storage": trouble or facts.storage})


def look(place: StorageProbe, name: str, data: Data | None) -> NodeReport:
    """What this process finds on its machine.

    Args:
        place: Where the driver left a word.
        name: Of the answer beside it.
        data: The archive to open.
    """
    fingerprint, trouble = _read(data) if data else (None, None)
    gpus, temporary = _gpus(), Path(tempfile.gettempdir())
    places = (place.storage, temporary) if isinstance(place.storage, Path) else (temporary,)
    return NodeReport(
        versions=versions(),
        token=_token(),
        gpus=gpus,
        cuda=_cuda_trouble() if gpus else None,
        disks={str(folder): _disk(folder) for folder in places},
        storage=place.answer(name),
        data=fingerprint,
        data_trouble=trouble,
        clock=time.time(),
    )


def versions() -> dict[str, str]:
    """Of Python, Ray, torch and this program, whose sources count byte by byte."""
    import torch

    import csmae

    sources = Path(csmae.__file__).parent
    checksum = 0
    for path in sorted(sources.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    own = f"{csmae.__version__}-{checksum:08x}"
    return {"python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__, "csmae": own}


def _token() -> str:
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


def _cuda_trouble() -> str | None:
    """Asked in a process that sees all GPUs: Ray hides them from one that asked for none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", CUDA], env=environment, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1][:160]


def _disk(folder: Path) -> tuple[int, float]:
    place = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(place)
    return usage.free, usage.used / max(1, usage.used + usage.free)


def _read(data: Data) -> tuple[str | None, str | None]:
    from csmae.data.archive_name import fingerprint

    try:
        return fingerprint(data), None
    except ConfigError as error:
        return None, str(error).splitlines()[0]
