"""The learning rate's schedules, and trainings that become longer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from csmae.config import Config, ConfigError, Optim
from csmae.settings import parse_config
from csmae.storage.layout import CHECKPOINT
from csmae.training.checkpoint import CheckpointError, shorter_training
from csmae.training.optim import describe_growth, learning_rate
from csmae.training.trainer import pretrain
from tests.conftest import small_config
from tests.training.test_resume import losses

CONSTANT = {"optim__schedule": "constant", "optim__cooldown_ratio": 0.5}


def rates(optim: Optim, num_epochs: int) -> list[float]:
    """Learning rates of a training with ten steps an epoch."""
    return [learning_rate(step, 10, optim, num_epochs) for step in range(10 * num_epochs)]


def test_the_default_schedule_warms_up_and_falls_to_zero_on_a_cosine() -> None:
    found = rates(Optim(lr=2.0, warmup_epochs=1), 10)
    assert found[:10] == [2.0 * (step + 1) / 11 for step in range(10)]
    assert found[10:] == [2.0 * 0.5 * (1 + math.cos(math.pi * (step / 90))) for step in range(90)]
    assert 0 < found[-1] < 0.01


def test_the_constant_schedule_is_constant_until_it_cools_down() -> None:
    found = rates(Optim(lr=2.0, warmup_epochs=1, schedule="constant"), 10)
    assert found[:10] == [2.0 * (step + 1) / 11 for step in range(10)]
    assert found[10:80] == [2.0] * 70
    assert found[80:] == [2.0 * (1 - math.sqrt(step / 20)) for step in range(20)]
    assert 0 < found[-1] < 0.1


@pytest.mark.parametrize(("ratio", "num_epochs", "expected"), [(0.2, 2, 1), (0.2, 12, 10), (0.2, 13, 10), (0.0, 7, 7)])
def test_the_cooldown_has_whole_epochs(ratio: float, num_epochs: int, expected: int) -> None:
    optim = Optim(warmup_epochs=0, schedule="constant", cooldown_ratio=ratio)
    assert optim.epochs_before_decay(num_epochs) == expected
    assert rates(optim, num_epochs)[: 10 * expected + 1] == [1e-4] * min(10 * expected + 1, 10 * num_epochs)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("longer", [9, 20, 150])
def test_a_longer_training_has_the_same_rates_before_the_decay(schedule: Any, longer: int) -> None:
    optim = Optim(warmup_epochs=2, schedule=schedule)
    first = 10 * optim.epochs_before_decay(8)
    assert rates(optim, longer)[:first] == rates(optim, 8)[:first]
    assert rates(optim, longer)[first + 1] != rates(optim, 8)[first + 1]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"schedule": "constant", "cooldown_ratio": 0.5, "warmup_epochs": 3},
            "optim.warmup_epochs and the cooldown must fit into train.epochs: found 3 and 2 of 4",
        ),
        ({"cooldown_ratio": 1}, "optim.cooldown_ratio: input should be less than 1, found 1"),
        ({"schedule": "linear"}, "optim.schedule: input should be 'cosine' or 'constant', found 'linear'"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_line(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"optim": {"warmup_epochs": 1, **values}, "train": {"epochs": 4}}, "run.yaml")
    assert str(caught.value) == f"run.yaml: {text}"


def train(config: Config, folder: Path, until: int | None = None) -> list[dict[str, float]]:
    """Train, and close the training after an epoch, as a pause does."""
    found, training = [], pretrain(config, folder)
    for epoch in training:
        found.append(losses(epoch.metrics))
        if epoch.number == until:
            training.close()
    return found


def state(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / CHECKPOINT, weights_only=True)
    return {name: content[name] for name in ("model", "optimizer", "progress")}


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_training_that_pauses_before_its_decay_and_becomes_longer_is_byte_equal_to_a_long_one(
    schedule: str, tmp_path: Path
) -> None:
    values = {**CONSTANT, "optim__schedule": schedule, "optim__warmup_epochs": 2}
    short, longer = (small_config(**values, train__epochs=epochs) for epochs in (4, 6))
    expected = train(longer, tmp_path / "whole")
    parts = train(short, tmp_path / "parts", until=2)
    assert parts + train(longer, tmp_path / "parts") == expected
    torch.testing.assert_close(state(tmp_path / "parts"), state(tmp_path / "whole"), rtol=0, atol=0)
    encoders = [(tmp_path / run / "encoder" / "encoder.safetensors").read_bytes() for run in ("whole", "parts")]
    assert encoders[0] == encoders[1]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_finished_training_continues_with_the_rates_of_the_longer_schedule(schedule: str, tmp_path: Path) -> None:
    short, longer = (
        small_config(**{**CONSTANT, "optim__schedule": schedule, "train__epochs": epochs}) for epochs in (2, 4)
    )
    whole = train(longer, tmp_path / "whole")
    finished = train(short, tmp_path / "parts")
    rest = train(longer, tmp_path / "parts")
    assert [epoch["train/lr"] for epoch in rest] == [epoch["train/lr"] for epoch in whole[2:]]
    assert (len(finished), len(rest)) == (2, 2) and rest != whole[2:]


def test_a_training_may_only_become_longer(tmp_path: Path) -> None:
    train(small_config(train__epochs=4), tmp_path, until=2)
    assert shorter_training(tmp_path, small_config(train__epochs=4)) is None
    assert shorter_training(tmp_path, small_config(train__epochs=6)) == (4, 2)
    assert shorter_training(tmp_path / "new", small_config(train__epochs=6)) is None
    with pytest.raises(CheckpointError) as caught:
        train(small_config(train__epochs=3), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / CHECKPOINT}: was written with train.epochs 4, the configuration says 3: use another folder, or at least 4"
    )


def test_growth_is_described_in_one_line() -> None:
    cosine, constant = Optim(warmup_epochs=1), Optim(warmup_epochs=1, schedule="constant")
    same = "train.epochs grows from 10 to 20: what is trained is the same as in a training that had 20 epochs from the start"
    assert describe_growth(10, constant, 20, 8) == describe_growth(10, cosine, 20, 1) == same
    assert "follows the longer schedule" in describe_growth(10, constant, 20, 9)
    assert describe_growth(10, constant, 20, 9).endswith("(optim.schedule constant: the cooldown had begun)")
    assert describe_growth(10, cosine, 20, 2).endswith("(optim.schedule constant makes it so until the cooldown)")
