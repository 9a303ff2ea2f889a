"""Trainings that pause after an epoch, and trainings that start from a copy of another one's checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from csmae.config import Config, can_change_in_training
from csmae.model.csmae import build_model
from csmae.settings import flatten
from csmae.storage.layout import CHECKPOINT
from csmae.training.checkpoint import CheckpointError
from csmae.training.trainer import pretrain
from tests.conftest import small_config
from tests.training.test_resume import losses

CHANGED = {
    "data__horizontal_flip": 0.0,
    "masking__ratio": 0.7,
    "masking__strategy": "disjoint",
    "loss__mim_weight": 2.0,
    "loss__temperature": 0.1,
    "loss__norm_pix": True,
    "optim__lr": 3e-3,
    "optim__weight_decay": 0.5,
    "optim__betas": (0.8, 0.9),
    "optim__warmup_epochs": 0,
}


def trained(config: Config, run_dir: Path, **options: Any) -> list[dict[str, float]]:
    return [losses(epoch.metrics) for epoch in pretrain(config, run_dir, **options)]


def checkpoint(run_dir: Path) -> dict[str, Any]:
    return dict(torch.load(run_dir / CHECKPOINT, weights_only=True))


def assert_same_state(a: Path, b: Path) -> None:
    """Weights and optimizer states are equal bit for bit."""
    first, second = checkpoint(a), checkpoint(b)
    assert all(torch.equal(tensor, second["model"][name]) for name, tensor in first["model"].items())
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    for number, state in first["optimizer"]["state"].items():
        assert all(torch.equal(tensor, second["optimizer"]["state"][number][name]) for name, tensor in state.items())


def test_two_epochs_and_two_more_after_a_pause_are_bit_for_bit_four_epochs(tmp_path: Path) -> None:
    config = small_config(train__checkpoint_every=3, eval__every=3)
    expected = trained(config, tmp_path / "whole")
    paused = trained(config, tmp_path / "paused", until=2)
    assert len(paused) == 2 and checkpoint(tmp_path / "paused")["progress"]["epochs"] == 2
    assert not any(name.startswith("val/") for name in paused[1]), "a pause changes no scores"
    encoder = json.loads((tmp_path / "paused" / "encoder" / "config.json").read_text())
    assert encoder["details"]["epoch"] == 2
    assert trained(config, tmp_path / "paused", until=2) == [], "it is trained already"
    assert paused + trained(config, tmp_path / "paused", until=9) == expected
    assert_same_state(tmp_path / "whole", tmp_path / "paused")


def test_a_training_that_pauses_after_each_epoch_is_bit_for_bit_equal(tmp_path: Path) -> None:
    config = small_config()
    expected = trained(config, tmp_path / "whole")
    actual = [trained(config, tmp_path / "paused", until=epoch) for epoch in range(1, 5)]
    assert actual == [[metrics] for metrics in expected]
    assert_same_state(tmp_path / "whole", tmp_path / "paused")


def test_a_copy_continues_with_its_own_configuration(tmp_path: Path) -> None:
    trained(small_config(), tmp_path / "parent", until=2)
    copied = trained(small_config(**CHANGED), tmp_path / "copy", parent_dir=tmp_path / "parent")
    assert len(copied) == 2
    group = checkpoint(tmp_path / "copy")["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.8, 0.9))
    same = trained(small_config(), tmp_path / "same", parent_dir=tmp_path / "parent")
    assert copied[0]["train/loss"] != same[0]["train/loss"]
    assert same == trained(small_config(), tmp_path / "parent"), "an unchanged copy does what its parent does"
    assert_same_state(tmp_path / "same", tmp_path / "parent")


class WorkerDiedError(Exception):
    """Stands for a worker's death."""


def interrupt(done: int, total: int) -> None:
    raise WorkerDiedError


def test_a_copy_that_is_interrupted_does_not_depend_on_its_parent_any_more(tmp_path: Path) -> None:
    parent, config = tmp_path / "parent", small_config(optim__lr=3e-3)
    trained(small_config(), parent, until=2)
    expected = trained(config, tmp_path / "whole", parent_dir=parent)
    with pytest.raises(WorkerDiedError):
        trained(config, tmp_path / "copy", parent_dir=parent, on_step=interrupt)
    trained(small_config(), parent)
    assert trained(config, tmp_path / "copy", parent_dir=parent) == expected
    shutil.rmtree(parent)
    assert trained(config, tmp_path / "copy", parent_dir=parent) == []
    assert_same_state(tmp_path / "whole", tmp_path / "copy")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.epochs", 3),
        ("optim.batch_size", 4),
        ("data.max_train_pairs", 16),
        ("data.synthetic.seed", 1),
        ("model.pooling", "cls"),
        ("model.decoder_depth", 2),
        ("train.seed", 1),
    ],
)
def test_a_copy_cannot_change_the_data_the_network_or_the_length(tmp_path: Path, name: str, value: Any) -> None:
    trained(small_config(), tmp_path / "parent", until=1)
    assert not can_change_in_training(name)
    with pytest.raises(CheckpointError, match=rf"was written with {name} .*, the configuration says {value}: a copied"):
        trained(small_config(**{name.replace(".", "__"): value}), tmp_path / "copy", parent_dir=tmp_path / "parent")
    assert not (tmp_path / "copy" / CHECKPOINT).exists()


@pytest.mark.parametrize("changed", [{"loss__mim_weight": 0.0}, {"loss__umr_weight": 0.0, "loss__s1_weight": 0.0}])
def test_a_copy_cannot_switch_parts_of_the_network_on_or_off(tmp_path: Path, changed: dict[str, float]) -> None:
    trained(small_config(), tmp_path / "parent", until=1)
    with pytest.raises(CheckpointError, match="cannot change which loss weights are 0") as caught:
        trained(small_config(**changed), tmp_path / "copy", parent_dir=tmp_path / "parent")
    assert "\n" not in str(caught.value)


def test_a_parent_without_a_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"parent/checkpoint\.pt: does not exist: there is no checkpoint to copy"):
        trained(small_config(), tmp_path / "copy", parent_dir=tmp_path / "parent")


def test_fields_that_can_change_in_a_training_leave_the_parameters_as_they_are() -> None:
    def shapes(config: Config) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in build_model(config).named_parameters()}

    expected = shapes(small_config())
    assert all(can_change_in_training(name.replace("__", ".")) for name in CHANGED)
    assert all(shapes(small_config(**{name: value})) == expected for name, value in CHANGED.items())
    names = dict(flatten(small_config().model_dump(mode="json")))
    assert not any(can_change_in_training(name) for name in names if name.startswith("model."))
