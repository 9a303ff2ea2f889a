"""The training loop: it learns, resumes exactly, and explains errors."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from csmae import load_encoder
from csmae.config import ConfigError
from csmae.data.archive import open_archive
from csmae.model.csmae import CSMAE
from csmae.storage.layout import CHECKPOINT
from csmae.training.scoring import final_scores
from csmae.training.splits import validate_run
from csmae.training.trainer import DivergedError, pretrain
from tests.conftest import small_config

LOSSES = ("train/loss", "train/umr_s1", "train/cmr_s1_to_s2", "train/mim", "val/f1_mean", "val/mrr")


def test_the_loss_falls_and_every_metric_is_reported() -> None:
    epochs = list(pretrain(small_config()))
    assert [epoch.number for epoch in epochs] == [1, 2, 3, 4]
    assert epochs[-1].metrics["train/loss"] < epochs[0].metrics["train/loss"]
    metrics = epochs[-1].metrics
    directions = {f"val/f1/{a}_to_{b}" for a in ("s1", "s2") for b in ("s1", "s2")}
    assert directions | {*LOSSES, "train/lr", "train/pairs_per_s", "val/recall_at_1", "time/epoch_s"} <= set(metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_resumed_run_computes_the_same_losses_bit_for_bit(tmp_path: Path) -> None:
    config = small_config()
    whole = [epoch.metrics for epoch in pretrain(config, tmp_path / "whole")]
    first = pretrain(config, tmp_path / "parts")
    parts = [next(first).metrics, next(first).metrics]
    first.close()
    parts += [epoch.metrics for epoch in pretrain(config, tmp_path / "parts")]
    assert len(parts) == 4
    for a, b in zip(whole, parts, strict=True):
        assert [a[name] for name in LOSSES] == [b[name] for name in LOSSES]
    assert list(pretrain(config, tmp_path / "parts")) == [], "a finished run has no epochs left"


def test_the_seed_determines_the_losses() -> None:
    def first_loss(seed: int) -> float:
        return next(pretrain(small_config(train__seed=seed))).metrics["train/loss"]

    assert first_loss(1) == first_loss(1)
    assert first_loss(1) != first_loss(2)


def test_training_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(pretrain(small_config()))
    assert torch.equal(torch.rand(3), expected)


def test_the_encoder_of_a_run_loads_and_computes_features(tmp_path: Path) -> None:
    config = small_config()
    list(pretrain(config, tmp_path))
    first, second = load_encoder(tmp_path / "encoder"), load_encoder(tmp_path / "encoder")
    s1 = torch.randn(2, 2, 120, 120) * 5 - 15
    features = first.encode(s1=s1)
    assert features.s1 is not None
    assert features.s1.shape == (2, 96)
    assert features.s2 is None
    repeated = second.encode(s1=s1.numpy()).s1
    assert repeated is not None
    assert torch.equal(features.s1, repeated)
    scores = final_scores(config, tmp_path / "encoder")
    assert 0 < scores["test/f1_mean"] <= 1
    assert scores != final_scores(config)


def test_a_loss_that_is_not_finite_raises_diverged_error() -> None:
    with pytest.raises(DivergedError, match=r"the loss is not finite in epoch \d"):
        list(pretrain(small_config(optim__lr=1e30, optim__warmup_epochs=0)))


def test_a_checkpoint_of_another_architecture_is_rejected(tmp_path: Path) -> None:
    next(pretrain(small_config(), tmp_path))
    with pytest.raises(ConfigError, match=r"was written with model\.patch_size 30, the configuration says 15"):
        next(pretrain(small_config(model__patch_size=15), tmp_path))


def test_a_damaged_checkpoint_is_rejected(tmp_path: Path) -> None:
    next(pretrain(small_config(), tmp_path))
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"checkpoint.pt: is damaged .* remove it to restart the run"):
        next(pretrain(small_config(), tmp_path))


def test_a_checkpoint_of_another_version_is_rejected(tmp_path: Path) -> None:
    torch.save({"format": "csmae-checkpoint-2"}, tmp_path / CHECKPOINT)
    with pytest.raises(ConfigError, match=r"checkpoint.pt: was written by another version of csmae: remove it"):
        next(pretrain(small_config(), tmp_path))


def test_loading_a_checkpoint_executes_nothing(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, (f"open({str(tmp_path / 'owned')!r}, 'w')",)

    torch.save({"format": Attack()}, tmp_path / CHECKPOINT)
    with pytest.raises(ConfigError, match="is damaged"):
        next(pretrain(small_config(), tmp_path))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"optim__batch_size": 64}, "optim.batch_size 64 is larger than the training split: 32 pairs"),
        ({"optim__batch_size": 9}, "must be a multiple of the workers of a trial: 9 pairs on 2 workers"),
        ({"eval__k": 13}, "eval.k 13 needs as many scenes .* half of the validation split .* has 12"),
        ({"eval__k": 17, "eval__max_pairs": None, "data__synthetic__num_validation": 40}, "the test split .* has 16"),
        ({"data__path": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_run_that_cannot_be_trained_is_rejected_beforehand(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        validate_run(small_config(**values), world_size=2)
    assert "\n" not in str(caught.value)


def test_max_train_pairs_limits_the_training_split() -> None:
    epoch = next(pretrain(small_config(data__max_train_pairs=8)))
    assert epoch.metrics["train/loss"] > 0
    archive = open_archive(small_config().data)
    assert len(archive.split("train")) == 32


@pytest.mark.parametrize(
    "losses", [{"loss__mim_weight": 0}, {"loss__mde_weight": 0.5}, {"loss__umr_weight": 0, "loss__cmr_weight": 0}]
)
def test_micro_batches_do_not_change_the_losses(losses: dict[str, float]) -> None:
    whole = [epoch.metrics for epoch in pretrain(small_config(**losses))]
    parts = [epoch.metrics for epoch in pretrain(small_config(**losses, optim__micro_batch_size=3))]
    assert parts[0]["train/micro_batch"] == 3
    terms = [
        name
        for name in whole[0]
        if name.startswith("train/") and name not in ("train/micro_batch", "train/pairs_per_s")
    ]
    for a, b in zip(whole, parts, strict=True):
        assert [b[name] for name in terms] == pytest.approx([a[name] for name in terms], rel=1e-4)


def limit_memory(monkeypatch: pytest.MonkeyPatch, max_pairs: int) -> None:
    """Let forward passes of more pairs run out of memory."""
    forward = CSMAE.forward

    def limited(self: CSMAE, s1: Tensor, *others: Tensor) -> dict[str, Tensor]:
        if len(s1) > max_pairs:
            raise torch.OutOfMemoryError
        return forward(self, s1, *others)

    monkeypatch.setattr(CSMAE, "forward", limited)


def test_a_step_out_of_memory_is_repeated_with_half_the_micro_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_config()
    expected = next(pretrain(config)).metrics
    limit_memory(monkeypatch, 2)
    epochs = pretrain(config, tmp_path)
    metrics = next(epochs).metrics
    assert metrics["train/micro_batch"] == 2
    assert metrics["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
    epochs.close()
    assert next(pretrain(config, tmp_path)).metrics["train/micro_batch"] == 2, (
        "the next attempt starts with the smaller size"
    )


def test_a_pair_that_does_not_fit_is_an_error_with_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"out of memory with one pair .* M parameters .* MiB per pair"):
        next(pretrain(small_config()))
