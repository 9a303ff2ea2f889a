"""What the workers of a trial take of their machines, epoch by epoch."""

from __future__ import annotations

import math
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in what the system counts a process's memory by."""

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Usage:
    """Measures this process from now on, and with ``torch.distributed`` the whole group.

    A worker trains one trial after another, so the peaks of its memory are reset here.

    Args:
        device: On which it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._rss, self._peak_is_reset = 0.0, _reset_peak_rss()
        if device.type == "cuda":
            torch.cuda.init()  # or there are no figures to reset yet, which is an error
            torch.cuda.reset_peak_memory_stats(device)

    def measure(self) -> dict[str, float]:
        """What was taken since the last call. Collective.

        Returns:
            Sums over the workers: ``system/cpu_percent`` (100 is one core), ``system/rss_mb`` (the largest since this
            object was made; where the system does not reset its peak, the largest at the calls) and, with GPUs,
            ``system/gpu_mb`` (the largest likewise) and the mean ``system/gpu_percent`` of the last moments, where NVML
            tells it (``pip install nvidia-ml-py``).
        """
        wall, cpu = time.perf_counter(), time.process_time()
        self._rss = max(self._rss, _rss_bytes("VmHWM" if self._peak_is_reset else "VmRSS"))
        own = [100 * (cpu - self._cpu) / (wall - self._wall), self._rss / 2**20, *_gpu(self._device)]
        self._wall, self._cpu = wall, cpu
        sums = torch.tensor(own, dtype=torch.float64, device=self._device)
        workers = 1
        if dist.is_initialized():
            dist.all_reduce(sums)
            workers = dist.get_world_size()
        names = ("cpu_percent", "rss_mb", "gpu_mb", "gpu_percent")
        found = dict(zip(names, sums.tolist(), strict=False))
        if "gpu_percent" in found:
            found["gpu_percent"] /= workers
        return {f"system/{name}": value for name, value in found.items() if math.isfinite(value)}


def _reset_peak_rss() -> bool:
    """Let the system forget the largest memory of this process so far (proc(5)); whether it can."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _rss_bytes(field: str) -> float:
    """A field of the process's status on Linux; elsewhere the largest memory of its whole life."""
    try:
        status = STATUS.read_text()
        return float(status.partition(f"\n{field}:")[2].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT)


def _gpu(device: torch.device) -> tuple[float, ...]:
    """Memory in MB and utilisation in per cent; NaN where NVML tells nothing."""
    if device.type != "cuda":
        return ()
    busy = math.nan
    if find_spec("pynvml"):
        try:
            busy = float(torch.cuda.utilization(device))
        except Exception:  # a part of a GPU (MIG) has no figure, and a container may hide it: each fails its own way
            busy = math.nan
    return torch.cuda.max_memory_reserved(device) / 2**20, busy
