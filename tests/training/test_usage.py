"""What a trial's workers take of their machines."""

import math
import time
from pathlib import Path

import pytest
import torch

from csmae.training import usage
from csmae.training.trainer import pretrain
from csmae.training.usage import Usage
from tests.conftest import small_config


def burn(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        math.sqrt(2)


def test_a_process_that_sleeps_takes_less_than_one_that_works() -> None:
    own = Usage(torch.device("cpu"))
    time.sleep(0.3)
    idle = own.measure()["system/cpu_percent"]
    burn(0.3)
    busy = own.measure()["system/cpu_percent"]
    assert idle < busy


def test_the_memory_is_the_systems_own_figure() -> None:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found = Usage(torch.device("cpu")).measure()["system/rss_mb"]
    assert found == pytest.approx(int(peak.split()[1]) / 1024, rel=0.05)


def test_memory_that_an_earlier_trial_took_is_not_counted() -> None:
    """As in a worker that trains one trial after another."""
    earlier = Usage(torch.device("cpu"))
    taken = torch.ones(64 * 2**20)  # 256 MiB
    peak = earlier.measure()["system/rss_mb"]
    del taken
    later = Usage(torch.device("cpu"))
    assert later.measure()["system/rss_mb"] < peak - 200
    taken = torch.ones(64 * 2**20)
    del taken
    assert later.measure()["system/rss_mb"] > peak - 50, "a peak between two measurements counts"


def test_memory_is_measured_where_the_system_forgets_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "CLEAR_REFS", Path("/proc/self/no such file"))
    found = Usage(torch.device("cpu"))
    before = found.measure()["system/rss_mb"]
    taken = torch.ones(64 * 2**20)
    during = found.measure()["system/rss_mb"]
    del taken
    assert during > before + 200
    assert found.measure()["system/rss_mb"] == during, "the largest so far"
    assert Usage(torch.device("cpu")).measure()["system/rss_mb"] < during - 200


def test_each_epoch_of_a_training_tells_it() -> None:
    metrics = next(iter(pretrain(small_config()))).metrics
    assert metrics["system/cpu_percent"] > 0
    assert metrics["system/rss_mb"] > 100
    assert ("system/gpu_mb" in metrics) == torch.cuda.is_available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_its_memory() -> None:
    device = torch.device("cuda:0")
    torch.ones(2**20, device=device)
    assert Usage(device).measure()["system/gpu_mb"] >= 4
