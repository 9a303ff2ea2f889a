"""Values that change during a training: ``train.changes``."""

from pathlib import Path
from typing import Any

import pytest

from csmae.changes import CHANGEABLE, config_at
from csmae.config import ConfigError
from csmae.model.cost import cost_metrics
from csmae.settings import parse_config
from csmae.training.checkpoint import CheckpointError
from csmae.training.trainer import pretrain
from tests.conftest import SMALL, small_config
from tests.training.test_pauses import assert_same_state, checkpoint, trained

CHANGES = (
    {"after_epoch": 1, "masking.ratio": 0.7, "optim.lr": 3e-3, "loss.temperature": 0.1},
    {"after_epoch": 3, "masking.strategy": "disjoint", "optim.weight_decay": 0.5, "optim.betas": [0.8, 0.9]},
)


def test_one_training_with_changes_is_bit_for_bit_the_chain_of_copies_that_made_them(tmp_path: Path) -> None:
    chain = trained(small_config(), tmp_path / "0", until=1)
    first = small_config(train__changes=CHANGES[:1])
    chain += trained(first, tmp_path / "1", until=3, parent_dir=tmp_path / "0")
    whole = small_config(train__changes=CHANGES)
    chain += trained(whole, tmp_path / "2", parent_dir=tmp_path / "1")
    assert trained(whole, tmp_path / "whole") == chain
    assert_same_state(tmp_path / "whole", tmp_path / "2")


def test_changes_have_the_effect_of_the_same_values_in_copies(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        name.replace(".", "__"): value for name, value in CHANGES[0].items() if name != "after_epoch"
    }
    trained(small_config(), tmp_path / "parent", until=1)
    expected = trained(small_config(**values), tmp_path / "copy", until=3, parent_dir=tmp_path / "parent")
    actual = trained(small_config(train__changes=CHANGES[:1]), tmp_path / "changed", until=3)[1:]
    assert actual == expected
    assert_same_state(tmp_path / "copy", tmp_path / "changed")


def test_options_of_the_optimizer_change_with_the_epoch(tmp_path: Path) -> None:
    config = small_config(train__changes=CHANGES)
    for until, expected in ((3, (0.05, (0.9, 0.95))), (4, (0.5, (0.8, 0.9)))):
        trained(config, tmp_path, until=until)
        group, others = checkpoint(tmp_path)["optimizer"]["param_groups"]
        assert (group["weight_decay"], tuple(group["betas"])) == expected
        assert (others["weight_decay"], tuple(others["betas"])) == (0, expected[1])


def test_costs_are_those_of_the_epoch() -> None:
    config = small_config(train__changes=CHANGES[:1])
    flops = [epoch.metrics["cost/flops"] for epoch in pretrain(config)]
    before, after = (cost_metrics(small_config(masking__ratio=ratio))["cost/flops"] for ratio in (0.5, 0.7))
    assert before != after
    assert flops == [before, after, after, after]


def test_a_training_that_resumes_may_change_what_is_not_trained_yet(tmp_path: Path) -> None:
    expected = trained(small_config(train__changes=CHANGES), tmp_path / "whole")
    part = trained(small_config(train__changes=CHANGES[:1]), tmp_path / "part", until=3)
    assert part + trained(small_config(train__changes=CHANGES), tmp_path / "part") == expected
    with pytest.raises(
        CheckpointError, match=r"was written with train.changes \[.*0.7.*\], the configuration says \[\]"
    ):
        trained(small_config(), tmp_path / "part")


def test_the_values_of_an_epoch_are_those_of_the_last_change_before_it() -> None:
    config = small_config(train__changes=CHANGES)
    assert [config_at(config, epoch).masking.ratio for epoch in range(4)] == [0.5, 0.7, 0.7, 0.7]
    assert config_at(config, 3) == small_config(
        masking__ratio=0.7,
        masking__strategy="disjoint",
        loss__temperature=0.1,
        optim__lr=3e-3,
        optim__weight_decay=0.5,
        optim__betas=[0.8, 0.9],
    )
    assert {"masking.ratio", "loss.mim_weight", "optim.lr"} < CHANGEABLE
    assert not {"model.size", "optim.batch_size", "train.compile", "data.path", "train.changes"} & CHANGEABLE


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([{"masking.ratio": 0.6}], "train.changes.0.after_epoch must be a whole number from 1 to 3, found None"),
        ([{"after_epoch": 0}], "train.changes.0.after_epoch must be a whole number from 1 to 3, found 0"),
        ([{"after_epoch": 4}], "train.changes.0.after_epoch must be a whole number from 1 to 3, found 4"),
        ([{"after_epoch": True}], "train.changes.0.after_epoch must be a whole number from 1 to 3, found True"),
        ([{"after_epoch": 2}] * 2, "train.changes.1.after_epoch must be a whole number from 3 to 3, found 2"),
        (
            [{"after_epoch": 1, "masking.rato": 0.6}],
            "'masking.rato' cannot change in a training; did you mean 'masking.ratio'?",
        ),
        ([{"after_epoch": 1, "model.size": "tiny"}], "train.changes.0: 'model.size' cannot change in a training"),
        ([{"after_epoch": 1, "train.compile": True}], "train.changes.0: 'train.compile' cannot change in a training"),
        ([{"after_epoch": 1, "masking.ratio": 2}], "train.changes.0: masking.ratio: input should be less than 1"),
        ([{"after_epoch": 1, "loss.mim_weight": 0}], "train.changes.0: the loss weights change the network"),
        ([3], "train.changes.0: input should be a valid dictionary"),
    ],
)
def test_changes_that_cannot_be_are_rejected_in_one_line(changes: list[Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**SMALL, "train": {"epochs": 4, "changes": changes}}, "run.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("run.yaml: ") and text in line
