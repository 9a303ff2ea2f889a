"""Out of memory in every phase of a training: work is halved, nothing is corrupted, and errors are one clear line."""

import logging
import os
import resource
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from csmae.config import Config, ConfigError
from csmae.data.pairs import PairBatch
from csmae.data.transforms import Preprocess
from csmae.encoders import SensorEncoder
from csmae.model.csmae import CSMAE
from csmae.out_of_memory import is_out_of_memory
from csmae.training.micro_batch import (
    FILE,
    MemoryLimitError,
    MicroBatch,
    SmallerMicroBatchError,
    save_micro_batch_limit,
)
from csmae.training.trainer import pretrain
from tests.conftest import free_port, small_config
from tests.training.test_resume import losses, weights
from tests.training.test_training import limit_memory


def limit(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, too_many: Callable[..., bool]) -> None:
    """Let a method run out of memory if ``too_many`` is true for its arguments."""
    method = getattr(owner, name)

    def limited(self: Any, *arguments: Any, **named: Any) -> Any:
        if too_many(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return method(self, *arguments, **named)

    monkeypatch.setattr(owner, name, limited)


def more_than(num_pairs: int) -> Callable[..., bool]:
    return lambda batch, *others: len(batch.s1) > num_pairs


def trained(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in losses(metrics).items() if name != "train/micro_batch"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConfigError("out of memory with one pair at a time"), False),
    ],
)
def test_out_of_memory_errors_are_recognised_by_type_or_message(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_the_error_of_torchs_cpu_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_augmentation_that_runs_out_of_memory_is_repeated_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = next(pretrain(small_config(eval__batch_size=2))).metrics
    limit(monkeypatch, Preprocess, "forward", more_than(2))
    metrics = next(pretrain(small_config(eval__batch_size=2))).metrics
    assert metrics["train/micro_batch"] == 2
    assert trained(metrics) == pytest.approx(trained(expected), rel=1e-4)


def test_scores_that_run_out_of_memory_are_computed_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = next(pretrain(small_config())).metrics
    limit(monkeypatch, SensorEncoder, "embed", more_than(3))
    with caplog.at_level(logging.WARNING):
        metrics = next(pretrain(small_config())).metrics
    assert trained(metrics) == pytest.approx(trained(expected), rel=1e-5)
    assert metrics["train/micro_batch"] == 8, "the training's own batch fits"
    messages = [f"out of memory: embedding continues with batches of {num}" for num in (8, 4, 2)]
    assert [record.getMessage() for record in caplog.records] == messages


def test_scoring_for_which_one_pair_is_too_much_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, SensorEncoder, "embed", more_than(0))
    text = "^out of memory while scoring 24 validation pairs, one pair at a time: lower eval.max_pairs, .* model$"
    with pytest.raises(ConfigError, match=text):
        next(pretrain(small_config()))


def test_a_snapshot_that_runs_out_of_memory_is_skipped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit(monkeypatch, CSMAE, "reconstruct", lambda *_: True)
    with caplog.at_level(logging.WARNING):
        assert len(list(pretrain(small_config(train__epochs=2), tmp_path))) == 2
    assert "epoch-0001.npz: out of memory: this epoch has no pictures" in caplog.text


def test_weights_and_moments_that_do_not_fit_are_one_line_before_any_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zeros_like, left = torch.zeros_like, 5

    def limited(tensor: Tensor, **options: Any) -> Tensor:
        nonlocal left
        left -= isinstance(tensor, torch.nn.Parameter)
        if left < 0:
            raise torch.OutOfMemoryError
        return zeros_like(tensor, **options)

    monkeypatch.setattr(torch, "zeros_like", limited)
    with pytest.raises(
        ConfigError, match=r"^out of memory before the first step: .* 2\.2 M parameters, which take 33 MiB"
    ):
        next(pretrain(small_config(), tmp_path))
    assert not (tmp_path / FILE).exists(), "a smaller micro-batch would not help"


def test_after_an_optimiser_ran_out_of_memory_the_training_resumes_from_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(train__epochs=3)
    expected = [trained(epoch.metrics) for epoch in pretrain(config, tmp_path / "whole")]
    parts = pretrain(config, tmp_path / "parts")
    actual = [trained(next(parts).metrics)]
    with monkeypatch.context() as patch:
        calls = 0

        def third(*arguments: object) -> bool:
            nonlocal calls
            calls += 1
            return calls == 3

        limit(patch, torch.optim.AdamW, "step", third)
        with pytest.raises(
            SmallerMicroBatchError, match="resumes from its last checkpoint with micro-batches of 4 pairs"
        ):
            next(parts)
    resumed = [epoch.metrics for epoch in pretrain(config, tmp_path / "parts")]
    assert {metrics["train/micro_batch"] for metrics in resumed} == {4.0}
    actual += [trained(metrics) for metrics in resumed]
    for a, b in zip(expected, actual, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert weights(tmp_path / "parts").keys() == weights(tmp_path / "whole").keys()


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_reported_as_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    next(pretrain(small_config(), tmp_path))

    def load(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryLimitError, match="out of memory before the first step"):
        next(pretrain(small_config(), tmp_path))


def test_ranks_that_halve_at_the_same_time_save_the_smallest_size(tmp_path: Path) -> None:
    config, num_ranks = small_config(optim__batch_size=8 * 256), 8
    errors: list[Exception] = []
    start = threading.Barrier(num_ranks)

    def halve(micro_batch: MicroBatch) -> None:
        try:
            start.wait()
            for _ in range(8):
                micro_batch.halve()
        except Exception as error:
            errors.append(error)

    for number in range(20):
        folder = tmp_path / str(number)
        micro_batches = [MicroBatch(config, num_ranks, folder) for _ in range(num_ranks)]
        ranks = [threading.Thread(target=halve, args=(micro_batch,)) for micro_batch in micro_batches]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert errors == []
        assert [path.name for path in folder.iterdir()] == [FILE]
        assert MicroBatch(config, num_ranks, folder).size == 1


def test_a_saved_limit_never_grows(tmp_path: Path) -> None:
    for size, expected in ((8, 8), (2, 2), (4, 2)):
        save_micro_batch_limit(tmp_path, size)
        assert MicroBatch(small_config(), 1, tmp_path).size == expected


def train_with_little_memory(values: str, folder: str, more: int) -> None:
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # it compiles code for each new size, which takes memory
    next(pretrain(small_config()))  # loads everything that is loaded once, before the limit
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    size = int(status["VmSize"].split()[0]) * 1024 + more * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    metrics = [epoch.metrics for epoch in pretrain(Config.model_validate_json(values), Path(folder))]
    torch.save(metrics, Path(folder) / "metrics.pt")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the size of the process is read from /proc")
def test_a_process_with_too_little_memory_trains_with_a_smaller_micro_batch(tmp_path: Path) -> None:
    """The system allows 70 MiB more; the step needs 160."""
    config = small_config(model__patch_size=10, optim__batch_size=32, eval__batch_size=4, train__epochs=2)
    expected = [epoch.metrics for epoch in pretrain(config)]
    child = get_context("spawn").Process(
        target=train_with_little_memory, args=(config.model_dump_json(), str(tmp_path), 70)
    )
    child.start()
    child.join()
    actual = torch.load(tmp_path / "metrics.pt", weights_only=True)
    assert actual[-1]["train/micro_batch"] < 32
    for a, b in zip(expected, actual, strict=True):
        assert trained(b) == pytest.approx(trained(a), rel=1e-4)


def train_with_one_short_rank(rank: int, port: int, values: str, folder: str) -> None:
    """Two ranks with separate folders; rank 1 has memory for two pairs."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            limit_memory(patch, 2)
        metrics = [epoch.metrics for epoch in pretrain(Config.model_validate_json(values), Path(folder) / str(rank))]
    if rank == 0:
        torch.save(metrics, Path(folder) / "metrics.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_resume_with_the_micro_batch_that_fits_both(tmp_path: Path) -> None:
    config = small_config(train__epochs=1, optim__warmup_epochs=0)
    expected = trained(next(pretrain(config)).metrics)
    arguments = config.model_dump_json(), str(tmp_path)
    with pytest.raises(
        ProcessRaisedException, match=r"SmallerMicroBatchError: out of memory: .* micro-batches of 2 pairs"
    ):
        spawn(train_with_one_short_rank, (free_port(), *arguments), nprocs=2)
    assert not (tmp_path / "0" / FILE).exists(), "only the other rank saves it"
    spawn(train_with_one_short_rank, (free_port(), *arguments), nprocs=2)
    (metrics,) = torch.load(tmp_path / "metrics.pt", weights_only=True)
    assert metrics["train/micro_batch"] == 2
    assert trained(metrics) == pytest.approx(expected, rel=1e-4)


def test_a_slice_of_a_batch_has_the_same_pairs() -> None:
    batch = PairBatch(torch.rand(4, 2, 3, 3), torch.rand(4, 4, 3, 3), torch.rand(0, 6, 2, 2))
    assert torch.equal(batch.select(slice(1, 3)).s1, batch.s1[1:3])
    assert len(batch.select(slice(1, 3)).s2_20m) == 0
