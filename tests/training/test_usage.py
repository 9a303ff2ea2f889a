"""CPU, memory and GPU usage of a trial's workers."""

import math
import time
from pathlib import Path

import pytest
import torch

from csmae.training import usage
from csmae.training.trainer import pretrain
from csmae.training.usage import ResourceUsage
from tests.conftest import small_config


def burn(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        math.sqrt(2)


def test_a_sleeping_process_uses_less_cpu_than_a_busy_one() -> None:
    process = ResourceUsage(torch.device("cpu"))
    time.sleep(0.3)
    idle = process.measure()["system/cpu_percent"]
    burn(0.3)
    busy = process.measure()["system/cpu_percent"]
    assert idle < busy


def test_memory_equals_the_systems_figure() -> None:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    measured = ResourceUsage(torch.device("cpu")).measure()["system/rss_mb"]
    assert measured == pytest.approx(int(peak.split()[1]) / 1024, rel=0.05)


def test_memory_of_an_earlier_trial_is_not_counted() -> None:
    """A train worker trains one trial after another."""
    earlier = ResourceUsage(torch.device("cpu"))
    taken = torch.ones(64 * 2**20)  # 256 MiB
    peak = earlier.measure()["system/rss_mb"]
    del taken
    later = ResourceUsage(torch.device("cpu"))
    assert later.measure()["system/rss_mb"] < peak - 200
    taken = torch.ones(64 * 2**20)
    del taken
    assert later.measure()["system/rss_mb"] > peak - 50, "a peak between two measurements counts"


def test_memory_is_measured_if_the_system_cannot_reset_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "CLEAR_REFS", Path("/proc/self/no such file"))
    process = ResourceUsage(torch.device("cpu"))
    before = process.measure()["system/rss_mb"]
    taken = torch.ones(64 * 2**20)
    during = process.measure()["system/rss_mb"]
    del taken
    assert during > before + 200
    assert process.measure()["system/rss_mb"] == during, "the largest so far"
    assert ResourceUsage(torch.device("cpu")).measure()["system/rss_mb"] < during - 200


def test_each_epoch_reports_usage() -> None:
    metrics = next(iter(pretrain(small_config()))).metrics
    assert metrics["system/cpu_percent"] > 0
    assert metrics["system/rss_mb"] > 100
    assert ("system/gpu_mb" in metrics) == torch.cuda.is_available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_memory_is_reported() -> None:
    device = torch.device("cuda:0")
    torch.ones(2**20, device=device)
    assert ResourceUsage(device).measure()["system/gpu_mb"] >= 4
