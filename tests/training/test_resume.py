"""An interrupted and resumed training learns the same as an uninterrupted one."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from csmae.config import Config, ConfigError
from csmae.storage.layout import CHECKPOINT
from csmae.training.trainer import SYNC_EVERY, StoppedError, pretrain
from tests.conftest import free_port, small_config
from tests.support.processes import run_ranks

KILLS, EPOCHS = 20, 80  # more epochs than 20 runs of up to 1.5 s can train


def losses(metrics: dict[str, float]) -> dict[str, float]:
    """Computed metrics, without measured ones."""
    return {name: v for name, v in metrics.items() if name.startswith(("train/", "val/")) and "pairs_per_s" not in name}


def weights(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / CHECKPOINT, weights_only=True)["model"])


def change_workers(rank: int, ports: list[int], values: str, folder: str) -> None:
    """Two ranks train two epochs, rank 0 alone the third, both the fourth."""
    torch.set_num_threads(1)
    config, metrics = Config.model_validate_json(values), []
    for port, epochs, together in zip(ports, (2, 1, 1), (True, False, True), strict=True):
        if together:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            dist.init_process_group("gloo", rank=rank, world_size=2)
        if together or rank == 0:
            training = pretrain(config, Path(folder))
            metrics += [losses(next(training).metrics) for _ in range(epochs)]
            training.close()
        if together:
            dist.destroy_process_group()
    if rank == 0:
        torch.save(metrics, Path(folder) / "metrics.pt")


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    config = small_config(optim__micro_batch_size=3)
    expected = [losses(epoch.metrics) for epoch in pretrain(config)]
    run_ranks(change_workers, [free_port() for _ in range(3)], config.model_dump_json(), str(tmp_path))
    actual = torch.load(tmp_path / "metrics.pt", weights_only=True)
    assert len(actual) == 4
    for a, b in zip(expected, actual, strict=True):
        trained = [name for name in a if name.startswith("train/") and name != "train/micro_batch"]
        assert [b[name] for name in trained] == pytest.approx([a[name] for name in trained], rel=1e-5)


def stopped_at(step: int) -> Callable[[int, int], bool]:
    """Request a stop once, after this step, counted over all epochs."""
    taken = 0

    def on_step(done: int, total: int) -> bool:
        nonlocal taken
        taken += 1
        return taken == step

    return on_step


def test_a_run_stopped_inside_an_epoch_resumes_at_that_step(tmp_path: Path) -> None:
    config = small_config(optim__batch_size=1, data__synthetic__num_train=3 * SYNC_EVERY + 5, train__epochs=3)
    expected = [losses(epoch.metrics) for epoch in pretrain(config, tmp_path / "whole")]
    actual: list[dict[str, float]] = []
    epochs = pretrain(config, tmp_path / "parts", on_step=stopped_at(3 * SYNC_EVERY + 5 + SYNC_EVERY + 1))
    with pytest.raises(StoppedError, match=f"after step {2 * SYNC_EVERY} of epoch 2"):
        actual.extend(losses(epoch.metrics) for epoch in epochs)
    steps: list[int] = []
    rest = pretrain(config, tmp_path / "parts", on_step=lambda done, total: steps.append(done))
    actual += [losses(next(rest).metrics)]
    assert steps == list(range(2 * SYNC_EVERY + 1, 3 * SYNC_EVERY + 6))
    actual += [losses(epoch.metrics) for epoch in rest]
    assert actual == expected
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def stop_together(rank: int, port: int, values: str, folder: str) -> None:
    """Two ranks train until one requests a stop; rank 0 alone completes the epoch."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = Config.model_validate_json(values)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with pytest.raises(StoppedError):
        next(pretrain(config, Path(folder), on_step=stopped_at(3) if rank else None))
    dist.destroy_process_group()
    if rank == 0:
        torch.save(losses(next(pretrain(config, Path(folder))).metrics), Path(folder) / "metrics.pt")


@pytest.mark.slow
def test_all_ranks_stop_if_one_requests_it_and_their_sums_are_kept(tmp_path: Path) -> None:
    config = small_config(optim__batch_size=2, data__synthetic__num_train=2 * SYNC_EVERY + 6)
    expected = losses(next(pretrain(config)).metrics)
    run_ranks(stop_together, free_port(), config.model_dump_json(), str(tmp_path))
    actual = torch.load(tmp_path / "metrics.pt", weights_only=True)
    trained = [name for name in expected if name.startswith("train/")]
    assert [actual[name] for name in trained] == pytest.approx([expected[name] for name in trained], rel=1e-5)


def train_in_separate_folders(rank: int, port: int, values: str, folder: str) -> None:
    """Two ranks with separate folders; that of rank 0 has a checkpoint."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with pytest.raises(ConfigError, match="must be one folder for all workers: they find 0 and 1 epochs in it"):
        next(pretrain(Config.model_validate_json(values), Path(folder) / str(rank)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_workers_that_do_not_share_the_folder_are_rejected(tmp_path: Path) -> None:
    config = small_config()
    next(pretrain(config, tmp_path / "0"))
    run_ranks(train_in_separate_folders, free_port(), config.model_dump_json(), str(tmp_path))


def test_a_run_resumes_with_another_precision(tmp_path: Path) -> None:
    for number, precision in enumerate(("fp32", "fp16", "fp32", "bf16"), start=1):
        assert next(pretrain(small_config(train__precision=precision), tmp_path)).number == number


def train_in(values: str, folder: str) -> None:
    torch.set_num_threads(1)
    for _ in pretrain(Config.model_validate_json(values), Path(folder)):
        pass


@pytest.mark.slow
def test_a_run_killed_at_random_moments_is_bit_for_bit_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    config = small_config(train__epochs=EPOCHS)
    last = [losses(epoch.metrics) for epoch in pretrain(config, tmp_path / "whole")][-1]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["csmae.training.trainer", "test_resume"])
    moments = random.Random(0)
    arguments = (config.model_dump_json(), str(tmp_path / "killed"))
    for _ in range(KILLS):
        process = processes.Process(target=train_in, args=arguments)
        process.start()
        time.sleep(moments.uniform(0.2, 1.5))
        process.kill()
        process.join()
    rest = [losses(epoch.metrics) for epoch in pretrain(config, tmp_path / "killed")]
    assert 0 < len(rest) < EPOCHS, "the kills hit the training, and it resumed from its checkpoints"
    assert rest[-1] == last
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
    files = [{path.relative_to(run) for path in run.rglob("*")} for run in (tmp_path / "whole", tmp_path / "killed")]
    assert files[0] == files[1], "no partial file is left"


def test_a_full_disk_is_one_error_and_the_last_good_checkpoint_resumes(small_disk: Path, tmp_path: Path) -> None:
    config = small_config()
    expected = [losses(epoch.metrics) for epoch in pretrain(config, tmp_path / "whole")]
    run_dir = small_disk / "run"
    training = pretrain(config, run_dir)
    next(training)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb") as file:
        while True:
            file.write(bytes(1 << 20))
    with pytest.raises(ConfigError, match=r"run: epoch 2 cannot be written \(.*\): the last good checkpoint") as caught:
        next(training)
    assert "\n" not in str(caught.value)
    assert not list(run_dir.rglob("*.tmp")), "no partial file takes the remaining space"
    ballast.unlink()
    assert [losses(epoch.metrics) for epoch in pretrain(config, run_dir)] == expected[1:]
