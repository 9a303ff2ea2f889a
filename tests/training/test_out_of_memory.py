"""Too little memory, wherever a training may meet it: work is halved, nothing is corrupted, and the end is one clear line."""

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
from csmae.training.micro_batch import FILE, MemoryLimitError, MicroBatch, SmallerMicroBatchError, note_micro_batch
from csmae.training.trainer import pretrain
from tests.conftest import free_port, small_config
from tests.training.test_resume import losses, weights
from tests.training.test_training import limit_memory


def limit(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, too_many: Callable[..., bool]) -> None:
    """Let a method run out of memory where ``too_many`` says so of its arguments."""
    method = getattr(owner, name)

    def limited(self: Any, *arguments: Any, **named: Any) -> Any:
        if too_many(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Say.")
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
def test_an_error_for_lack_of_memory_is_known_by_its_type_or_text(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_what_torch_raises_where_a_machine_has_too_little_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_augmentation_that_runs_out_of_memory_is_repeated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert metrics["train/micro_batch"] == 8, "the training's own batch did fit"
    told = [f"out of memory: embedding goes on with {num} at a time" for num in (8, 4, 2)]
    assert [record.getMessage() for record in caplog.records] == told


def test_a_score_for_which_one_pair_is_too_much_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, SensorEncoder, "embed", more_than(0))
    text = "^out of memory while 24 validation pairs were scored, one pair at a time: lower eval.max_pairs, .* model$"
    with pytest.raises(ConfigError, match=text):
        next(pretrain(small_config()))


def test_pictures_that_run_out_of_memory_end_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit(monkeypatch, CSMAE, "reconstruct", lambda *_: True)
    with caplog.at_level(logging.WARNING):
        assert len(list(pretrain(small_config(train__epochs=2), tmp_path))) == 2
    assert "epoch-0001.npz: out of memory: there will be no pictures of this epoch" in caplog.text


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
    assert not (tmp_path / FILE).exists(), "smaller batches would not help"


def test_an_optimiser_that_runs_out_of_memory_leaves_the_last_checkpoint_to_go_on_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config(train__epochs=3)
    expected = [trained(epoch.metrics) for epoch in pretrain(config, tmp_path / "whole")]
    parts = pretrain(config, tmp_path / "parts")
    told = [trained(next(parts).metrics)]
    with monkeypatch.context() as patch:
        calls = 0

        def third(*arguments: object) -> bool:
            nonlocal calls
            calls += 1
            return calls == 3

        limit(patch, torch.optim.AdamW, "step", third)
        with pytest.raises(
            SmallerMicroBatchError, match="goes on from its last checkpoint with micro-batches of 4 pairs"
        ):
            next(parts)
    again = [epoch.metrics for epoch in pretrain(config, tmp_path / "parts")]
    assert {metrics["train/micro_batch"] for metrics in again} == {4.0}
    told += [trained(metrics) for metrics in again]
    for a, b in zip(expected, told, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert weights(tmp_path / "parts").keys() == weights(tmp_path / "whole").keys()


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_called_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    next(pretrain(small_config(), tmp_path))

    def load(*arguments: object, **named: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryLimitError, match="out of memory before the first step"):
        next(pretrain(small_config(), tmp_path))


def test_ranks_that_halve_at_the_same_moment_leave_the_smallest_size(tmp_path: Path) -> None:
    config, num_ranks = small_config(optim__batch_size=8 * 256), 8
    errors: list[Exception] = []
    start = threading.Barrier(num_ranks)

    def halve(memory: MicroBatch) -> None:
        try:
            start.wait()
            for _ in range(8):
                memory.halve()
        except Exception as error:
            errors.append(error)

    for number in range(20):
        folder = tmp_path / str(number)
        memories = [MicroBatch(config, num_ranks, folder) for _ in range(num_ranks)]
        ranks = [threading.Thread(target=halve, args=(memory,)) for memory in memories]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert errors == []
        assert [path.name for path in folder.iterdir()] == [FILE]
        assert MicroBatch(config, num_ranks, folder).micro_batch == 1


def test_a_size_that_is_noted_never_grows(tmp_path: Path) -> None:
    for size, expected in ((8, 8), (2, 2), (4, 2)):
        note_micro_batch(tmp_path, size)
        assert MicroBatch(small_config(), 1, tmp_path).micro_batch == expected


def train_with_little_memory(values: str, folder: str, more: int) -> None:
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # it compiles code for each new size, which takes memory of its own
    next(pretrain(small_config()))  # what is loaded and kept once is there before the limit
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    size = int(status["VmSize"].split()[0]) * 1024 + more * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    told = [epoch.metrics for epoch in pretrain(Config.model_validate_json(values), Path(folder))]
    torch.save(told, Path(folder) / "told.pt")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the size of the process is read from /proc")
def test_a_process_that_gets_too_little_memory_trains_with_a_smaller_micro_batch(tmp_path: Path) -> None:
    """The system refuses memory: 70 MiB more where the step wants 160."""
    config = small_config(model__patch_size=10, optim__batch_size=32, eval__batch_size=4, train__epochs=2)
    expected = [epoch.metrics for epoch in pretrain(config)]
    child = get_context("spawn").Process(
        target=train_with_little_memory, args=(config.model_dump_json(), str(tmp_path), 70)
    )
    child.start()
    child.join()
    told = torch.load(tmp_path / "told.pt", weights_only=True)
    assert told[-1]["train/micro_batch"] < 32
    for a, b in zip(expected, told, strict=True):
        assert trained(b) == pytest.approx(trained(a), rel=1e-4)


def train_where_one_rank_is_short(rank: int, port: int, values: str, folder: str) -> None:
    """Two ranks with folders of their own, of which one has memory for two pairs."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            limit_memory(patch, 2)
        told = [epoch.metrics for epoch in pretrain(Config.model_validate_json(values), Path(folder) / str(rank))]
    if rank == 0:
        torch.save(told, Path(folder) / "told.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_go_on_together_with_what_fits_the_one_that_has_less(tmp_path: Path) -> None:
    config = small_config(train__epochs=1, optim__warmup_epochs=0)
    expected = trained(next(pretrain(config)).metrics)
    arguments = config.model_dump_json(), str(tmp_path)
    with pytest.raises(
        ProcessRaisedException, match=r"SmallerMicroBatchError: out of memory: .* micro-batches of 2 pairs"
    ):
        spawn(train_where_one_rank_is_short, (free_port(), *arguments), nprocs=2)
    assert not (tmp_path / "0" / FILE).exists(), "only the other rank knows"
    spawn(train_where_one_rank_is_short, (free_port(), *arguments), nprocs=2)
    (metrics,) = torch.load(tmp_path / "told.pt", weights_only=True)
    assert metrics["train/micro_batch"] == 2
    assert trained(metrics) == pytest.approx(expected, rel=1e-4)


def test_a_part_of_a_batch_has_the_same_pairs() -> None:
    batch = PairBatch(torch.rand(4, 2, 3, 3), torch.rand(4, 4, 3, 3), torch.rand(0, 6, 2, 2))
    assert torch.equal(batch.some(slice(1, 3)).s1, batch.s1[1:3])
    assert len(batch.some(slice(1, 3)).s2_20m) == 0
