"""What a search's worker groups are made of."""

from __future__ import annotations

from dataclasses import dataclass

from csmae.storage.manifest import Files

PRETRAIN = "csmae.training.trainer:pretrain"


@dataclass(frozen=True)
class WorkerGroupSpec:
    """What each slot of a search is made of."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    retries: int
    """Restarts of a trial after a worker died."""
    hang_timeout_s: float
    """HeartbeatTimeout after which workers are taken for dead."""
    scratch_dir: str
    """Where Ray Train leaves its own notes."""
    files: Files | None = None
    """The bucket that holds the trials' files; None where their folder is shared."""
    accelerator_type: str | None = None
    """Of the workers' GPUs, where that matters."""
    pretrain: str = PRETRAIN
    """Module and name of the generator that trains."""

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker} | gpus

    @property
    def group_text(self) -> str:
        """The workers of a trial in words, such as ``2 x 1 CPU``."""
        return f"{self.workers} x " + " and ".join(f"{n:g} {name}" for name, n in self.worker_resources.items())
