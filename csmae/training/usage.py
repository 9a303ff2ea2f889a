"""CPU, memory and GPU usage of a trial's workers, epoch by epoch."""

from __future__ import annotations

import math
import resource
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from csmae.distributed import rank_and_world_size

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes per unit of ``ru_maxrss``."""

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ResourceUsage:
    """Measures this process from now on; with ``torch.distributed``, the whole group.

    A train worker trains one trial after another, so the memory peaks of earlier trials are reset here.

    Args:
        device: Device that the process computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._rss, self._peak_is_reset = 0.0, _reset_peak_rss()
        if device.type == "cuda":
            torch.cuda.init()  # before it there are no statistics to reset, which is an error
            torch.cuda.reset_peak_memory_stats(device)

    def measure(self) -> dict[str, float]:
        """Measure the usage since the last call. Collective.

        Returns:
            Sums over the workers: ``system/cpu_percent`` (100 is one core), ``system/rss_mb`` (the peak since this
            object was created; if the system cannot reset its peak, the largest value at the calls) and, with GPUs,
            ``system/gpu_mb`` (the peak since this object was created). With NVML (``pip install nvidia-ml-py``), also
            the mean ``system/gpu_percent`` of the last moments.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        self._rss = max(self._rss, _rss_bytes("VmHWM" if self._peak_is_reset else "VmRSS"))
        local = [100 * (cpu - self._cpu) / (wall - self._wall), self._rss / 2**20, *_gpu_usage(self._device)]
        self._wall, self._cpu = wall, cpu
        sums = torch.tensor(local, dtype=torch.float64, device=self._device)
        _, world_size = rank_and_world_size()
        if world_size > 1:
            dist.all_reduce(sums)
        names = ("cpu_percent", "rss_mb", "gpu_mb", "gpu_percent")
        usage = dict(zip(names, sums.tolist(), strict=False))
        if "gpu_percent" in usage:
            usage["gpu_percent"] /= world_size
        return {f"system/{name}": value for name, value in usage.items() if math.isfinite(value)}


def _reset_peak_rss() -> bool:
    """Reset the system's memory peak of this process (proc(5)); returns whether the system can."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _rss_bytes(field: str) -> float:
    """A memory field of ``/proc/self/status``; outside Linux, the peak over the whole life of the process."""
    try:
        status = STATUS.read_text()
        return float(status.partition(f"\n{field}:")[2].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT)


def _gpu_usage(device: torch.device) -> tuple[float, ...]:
    """Peak memory in MB and utilization in percent; NaN if NVML does not report it."""
    if device.type != "cuda":
        return ()
    utilisation = math.nan
    if find_spec("pynvml"):
        with suppress(Exception):  # a MIG slice has no figure, and a container may hide it: each fails in its own way
            utilisation = float(torch.cuda.utilization(device))
    return torch.cuda.max_memory_reserved(device) / 2**20, utilisation
