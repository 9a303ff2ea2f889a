"""Describes the worker groups of a search; all groups of a search are alike."""

from __future__ import annotations

from dataclasses import dataclass

from csmae.cluster.resources import Allocation
from csmae.storage.manifest import RemoteStorage

PRETRAIN = "csmae.training.trainer:pretrain"


@dataclass(frozen=True)
class WorkerGroupSpec:
    """A worker group of a search."""

    allocation: Allocation
    """Number and resources of the workers."""
    retries: int
    """Restarts of a trial in a row, after a worker's death, that may bring no new epoch."""
    hang_timeout_s: float
    """Seconds without a heartbeat after which workers are considered dead."""
    scratch_dir: str
    """Ray Train's own files."""
    remote: RemoteStorage | None = None
    """Object store that holds the trials' files; None where all nodes share their folder."""
    pretrain: str = PRETRAIN
    """Module and name of the generator that trains."""
