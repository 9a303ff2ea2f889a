"""Tests that need a GPU, but neither Ray nor Optuna nor MLflow: ``pytest tests/training/test_gpu.py`` on a machine with one."""

import gc
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from csmae.config import Config
from csmae.data.archive import open_archive
from csmae.data.loader import batches, epoch_rows
from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from csmae.retrieval.embed import embed
from csmae.training.micro_batch import FILE, MemoryLimitError
from csmae.training.train_step import RECOMPILE_LIMIT, autocast_dtype
from csmae.training.trainer import pretrain
from csmae.training.usage import ResourceUsage
from tests.conftest import small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MIB = 2**20

LARGE: dict[str, Any] = {
    "model__patch_size": 10,
    "optim__batch_size": 128,
    "data__synthetic__num_train": 128,
    "train__precision": "fp32",
    "train__epochs": 2,
    "eval__batch_size": 8,
}
"""A step keeps 656 MiB of activations; the weights take 9 MiB."""


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The last GPU, with our memory freed."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    _free_memory(device)
    yield device
    _free_memory(device)


def _free_memory(device: torch.device) -> None:
    gc.collect()
    torch.cuda.init()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def at_most(num_bytes: float, device: torch.device) -> Iterator[None]:
    """Limit the GPU memory of this process, including what it already holds."""
    _free_memory(device)
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.mem_get_info(device)[1], device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def losses(config: Config, device: torch.device, folder: Path | None = None) -> list[float]:
    return [epoch.metrics["train/loss"] for epoch in pretrain(config, folder, str(device))]


def test_the_loader_thread_waits_on_the_gpu_that_receives_the_batches(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[str, int]] = []
    synchronize = torch.cuda.Event.synchronize

    def recorded(event: torch.cuda.Event) -> None:
        waits.append((threading.current_thread().name, torch.cuda.current_device()))
        synchronize(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", recorded)
    split = open_archive(small_config().data).split("train")
    rows = epoch_rows(len(split), 4, 0, 0)
    copies = [batch.to(device, non_blocking=True) for batch in batches(split, rows, device)]
    assert set(waits) == {("csmae-loader", device.index)}
    for row, copy in zip(rows, copies, strict=True):
        assert torch.equal(copy.s1.cpu(), split.read(row).s1)


def test_memory_of_an_earlier_trial_is_not_counted(device: torch.device) -> None:
    earlier = ResourceUsage(device)
    taken = torch.ones(128 * MIB, device=device)  # 512 MiB
    assert earlier.measure()["system/gpu_mb"] >= 512
    del taken
    torch.cuda.empty_cache()
    later = ResourceUsage(device)
    assert later.measure()["system/gpu_mb"] < 256
    taken = torch.ones(128 * MIB, device=device)
    del taken
    torch.cuda.empty_cache()
    assert later.measure()["system/gpu_mb"] >= 512, "a peak between two measurements counts"


def test_each_training_of_a_process_reports_its_own_memory(device: torch.device) -> None:
    small = {**LARGE, "optim__batch_size": 8, "train__epochs": 1, "optim__warmup_epochs": 0}
    peaks = []
    for values in (small, LARGE, small):
        peaks.append(next(pretrain(small_config(**values), None, str(device))).metrics["system/gpu_mb"])
        _free_memory(device)
    assert peaks[2] < peaks[1] - 300
    assert peaks[2] == pytest.approx(peaks[0], abs=64)


def test_a_step_that_does_not_fit_is_halved_and_gives_the_same_losses(
    device: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(**LARGE)
    expected = losses(config, device)
    peak = torch.cuda.max_memory_reserved(device)
    with at_most(peak / 2, device), caplog.at_level(logging.WARNING):
        actual = losses(config, device, tmp_path)
    assert int((tmp_path / FILE).read_text()) < 128
    assert "out of memory: repeating the step with micro-batches of 64 pairs" in caplog.text
    assert actual == pytest.approx(expected, rel=1e-4)


def test_scores_that_do_not_fit_are_computed_in_smaller_batches(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(**LARGE, data__synthetic__num_validation=256)
    split = open_archive(config.data).split("validation")
    encoder = SensorEncoder.from_model(build_model(config).to(device).eval(), config)
    expected = embed(encoder, split, 8)
    _free_memory(device)
    embed(encoder, split, 256)
    peak = torch.cuda.max_memory_reserved(device)
    with at_most(peak / 2, device), caplog.at_level(logging.WARNING):
        actual = embed(encoder, split, 256)
    assert "out of memory: embedding continues with batches of 128" in caplog.text
    for sensor, feature in expected.items():
        torch.testing.assert_close(actual[sensor], feature, rtol=1e-3, atol=1e-4)


def test_moments_that_do_not_fit_are_one_line_before_any_step(device: torch.device, tmp_path: Path) -> None:
    config = small_config(model__size="small", model__sensor_depth=10, model__cross_depth=2)
    weights = sum(p.numel() * 4 for p in build_model(config).parameters())
    with (
        at_most(torch.cuda.memory_reserved(device) + 2 * weights, device),
        pytest.raises(MemoryLimitError, match=r"out of memory before the first step: .* M parameters, which take"),
    ):
        next(pretrain(config, tmp_path, str(device)))
    assert not (tmp_path / FILE).exists()


def test_a_training_resumes_from_its_checkpoint(device: torch.device, tmp_path: Path) -> None:
    config = small_config(train__precision="fp32")
    expected = losses(config, device)
    parts = pretrain(config, tmp_path, str(device))
    first = [next(parts).metrics["train/loss"]]
    parts.close()
    assert first + losses(config, device, tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_trains_like_single_precision(device: torch.device, precision: str) -> None:
    single, half = (losses(small_config(train__precision=p), device) for p in ("fp32", precision))
    assert half == pytest.approx(single, rel=1e-2)
    assert half[-1] < half[0]


def test_auto_is_bf16_if_the_gpu_supports_it(device: torch.device) -> None:
    supported = torch.cuda.get_device_capability(device) >= (8, 0)
    assert autocast_dtype("auto", device) is (torch.bfloat16 if supported else torch.float16)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="train.compile needs a C++ compiler")
def test_compiled_trainings_compile_every_shape_once_and_compute_the_same_losses(
    device: torch.device, tmp_path: Path
) -> None:
    """Sensors of different lengths, micro-batches with a remainder, several query slices; two trials in a row."""
    trials: list[dict[str, Any]] = [{"model__pooling": "cls"}, {"model__embed_dim": 60, "model__decoder_depth": 2}]
    for number, more in enumerate(trials):
        shapes = {"masking__strategy": "disjoint", "masking__ratio": 0.7, "optim__micro_batch_size": 3, **more}
        config = small_config(**shapes, train__precision="fp32")
        expected = losses(config, device)
        counters.clear()
        compiled, actual = [], []
        on = config.model_copy(update={"train": config.train.model_copy(update={"compile": True})})
        for epoch in pretrain(on, tmp_path / str(number), str(device)):
            compiled.append(counters["stats"]["unique_graphs"])
            actual.append(epoch.metrics["train/loss"])
        assert not counters["unimplemented"], "a shape ran uncompiled"
        assert compiled == [compiled[0]] * 4 and 0 < compiled[0] < RECOMPILE_LIMIT / 2
        assert actual == pytest.approx(expected, rel=1e-3)
    torch.compiler.reset()


def test_an_encoder_is_fine_tuned_on_the_gpu(device: torch.device, tmp_path: Path) -> None:
    config = small_config()
    SensorEncoder.from_model(build_model(config), config).save(tmp_path)
    encoder = SensorEncoder.load(tmp_path).to(device).train()
    s2 = torch.rand(4, 10, 120, 120, device=device) * 4000
    optimizer, values = torch.optim.AdamW(encoder.parameters(), lr=1e-3), []
    for _ in range(5):
        loss = (encoder(s2=s2)["s2"] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values == sorted(values, reverse=True)
    smaller = torch.nn.functional.interpolate(s2, 60).requires_grad_()
    encoder(s2=smaller)["s2"][:, 0].sum().backward()
    assert smaller.grad is not None and smaller.grad.abs().sum() > 0
