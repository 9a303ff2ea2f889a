"""``csmae train``, alone and under torchrun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from csmae import load_encoder
from csmae.cli.main import main
from csmae.storage.layout import CHECKPOINT
from csmae.training import torchrun
from csmae.training.trainer import pretrain
from tests.conftest import SMALL, free_port, small_config
from tests.training.test_ddp import ROOT


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(SMALL))
    return path


def test_train_prints_a_line_per_epoch_and_saves_an_encoder(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_yaml.parent / "out"
    assert main(["train", str(run_yaml), "--set", "train.epochs=2", "--output-dir", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1/2  loss ")
    assert lines[1].startswith("epoch 2/2  loss ")
    assert load_encoder(out / "encoder").width == 96


def test_train_says_how_a_longer_training_continues(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(run_yaml.parent / "out")
    assert main(["train", str(run_yaml), "--set", "train.epochs=2", "--output-dir", out]) == 0
    assert capsys.readouterr().out.startswith("epoch 1/2")
    assert main(["train", str(run_yaml), "--set", "train.epochs=3", "--output-dir", out]) == 0
    note, epoch, *_ = capsys.readouterr().out.splitlines()
    assert note.startswith("note: train.epochs grows from 2 to 3: the learning rate of the remaining epochs follows")
    assert epoch.startswith("epoch 3/3  loss ")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("masking.rato=0.5", "'masking.rato' is not a field of the configuration; did you mean 'masking.ratio'?"),
        ("model.patch_size=16", "16 does not divide 120"),
        ("data.path=/nowhere", "/nowhere"),
        ("optim.batch_size=33", "optim.batch_size 33 is larger than the training split: 32 pairs"),
        ("optim.lr=0", "optim.lr: input should be greater than 0, found 0"),
        ("optim.lr=-1.0e-3", "optim.lr: input should be greater than 0, found -0.001"),
        ("train.epochs=1", "optim.warmup_epochs must be smaller than train.epochs: found 1 of 1"),
        ("optim.micro_batch_size=0", "optim.micro_batch_size: input should be greater than or equal to 1, found 0"),
        ("train.precision=fp8", "train.precision: input should be 'auto', 'fp32', 'bf16' or 'fp16', found 'fp8'"),
        ("train.compile=3", "train.compile: input should be a valid boolean"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    run_yaml: Path, option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(run_yaml), "--set", option, "--output-dir", str(run_yaml.parent / "out")]) == 2
    seen = capsys.readouterr()
    assert text in seen.err
    assert len(seen.err.splitlines()) == 1
    assert not (run_yaml.parent / "out").exists()


def test_a_missing_file_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("model.patch_size=15", "checkpoint.pt: was written with model.patch_size 30, the configuration says 15"),
        (
            "train.epochs=2",
            "checkpoint.pt: was written with train.epochs 4, the configuration says 2: use another folder,",
        ),
        ("optim.lr=5e-4", "checkpoint.pt: was written with optim.lr 0.001, the configuration says 0.0005"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_one_line_and_status_2(
    run_yaml: Path, option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run_yaml), "--output-dir", str(run_yaml.parent / "out")]
    next(pretrain(small_config(), run_yaml.parent / "out"))
    assert main(["train", *arguments, "--set", option]) == 2
    seen = capsys.readouterr().err
    assert text in seen
    assert len(seen.splitlines()) == 1


def test_a_truncated_checkpoint_is_one_line_and_status_2(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_yaml.parent / "out"
    next(pretrain(small_config(), out))
    (out / CHECKPOINT).write_bytes((out / CHECKPOINT).read_bytes()[:5000])
    assert main(["train", str(run_yaml), "--output-dir", str(out)]) == 2
    seen = capsys.readouterr().err
    assert "checkpoint.pt: is damaged" in seen
    assert len(seen.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "RANK is set in the environment, but WORLD_SIZE and MASTER_ADDR and MASTER_PORT is not: start all"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no"},
            "MASTER_PORT is 'no' in the environment, not an integer from 0 to 65535: start all",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"}, "MASTER_PORT is '65536' in"),
        (
            {"RANK": "abc", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK is 'abc' in the environment, not an integer from 0 to 1: start all",
        ),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is '2' in"),
        (
            {"WORLD_SIZE": "two", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "WORLD_SIZE is 'two' in the environment, not an integer of at least 1: start all",
        ),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "at 127.0.0.1:1 (MASTER_ADDR, MASTER_PORT)",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "gone.invalid", "MASTER_PORT": "1"}, "rank 1 of 2 has not met the others"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "rank 0 of 2 has not met"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_one_line_and_status_2(
    run_yaml: Path,
    environment: dict[str, str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in torchrun.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun, "JOIN_TIMEOUT_S", 1.0)
    assert main(["train", str(run_yaml), "--output-dir", str(run_yaml.parent / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert text in line and "unset RANK" in line


@pytest.mark.slow
def test_a_batch_that_two_workers_cannot_share_is_one_line_per_worker(run_yaml: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--monitor-interval",
        "10",  # torchrun stops the other worker as soon as it notices the end of one
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run(
        [
            *launcher,
            "train_worker.py",
            str(run_yaml),
            "--set",
            "optim.batch_size=9",
            "--output-dir",
            str(run_yaml.parent),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    text = "optim.batch_size must be a multiple of the workers of a trial: 9 pairs on 2 workers"
    assert done.stderr.splitlines().count(text) == 2
