"""What a trial's workers take of their machines."""

import math
import time
from pathlib import Path

import pytest
import torch

from conftest import small_config
from csmae.training.engine import pretrain
from csmae.training.usage import Usage


def burn(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        math.sqrt(2)


def test_a_process_that_sleeps_takes_less_than_one_that_works() -> None:
    usage = Usage(torch.device("cpu"))
    time.sleep(0.3)
    idle = usage.measure()["system/cpu_percent"]
    burn(0.3)
    busy = usage.measure()["system/cpu_percent"]
    assert idle < busy


def test_the_memory_is_the_systems_own_figure() -> None:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    found = Usage(torch.device("cpu")).measure()["system/rss_mb"]
    assert found == pytest.approx(int(peak.split()[1]) / 1024, rel=0.05)


def test_each_epoch_of_a_training_tells_it() -> None:
    metrics = next(iter(pretrain(small_config()))).metrics
    assert metrics["system/cpu_percent"] > 0
    assert metrics["system/rss_mb"] > 100
    assert "system/gpu_mb" not in metrics


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_its_memory() -> None:
    device = torch.device("cuda:0")
    torch.ones(2**20, device=device)
    assert Usage(device).measure()["system/gpu_mb"] >= 4
