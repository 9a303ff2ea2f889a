"""The training step: precision, compilation, zero weights, and what they must not change."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from csmae.config import ConfigError, Loss, Masking, Model
from csmae.model.blocks import Block
from csmae.model.csmae import CSMAE
from csmae.model.losses import nt_xent
from csmae.model.masking import draw_masks
from csmae.training.train_step import RECOMPILE_LIMIT, TrainStep
from csmae.training.trainer import pretrain
from tests.conftest import small_config
from tests.model.test_csmae import VARIANTS, batch, tiny
from tests.training.test_training import limit_memory

BATCH = 3


def step_flops(variant: str, loss: Loss) -> int:
    """FLOPs of a forward and backward pass; half of the patches are removed, so all directions decode equally many."""
    model = CSMAE(tiny(variant), Masking(), loss)
    with FlopCounterMode(display=False) as counter:
        model(*batch(size=BATCH))["loss"].backward()
    return int(counter.get_total_flops())


def contrast_flops(width: int) -> int:
    z1, z2 = torch.randn(2, BATCH, width, requires_grad=True).unbind()
    with FlopCounterMode(display=False) as counter:
        nt_xent(z1, z2, 0.5).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_of_weight_0_costs_no_flops(variant: str) -> None:
    model = tiny(variant)
    whole = step_flops(variant, Loss())
    no_mim, no_cmr, no_umr = (step_flops(variant, Loss(**{f"{name}_weight": 0})) for name in ("mim", "cmr", "umr"))
    alone = step_flops(variant, Loss(umr_weight=0, cmr_weight=0))
    assert whole - no_mim == contrast_flops(model.embed_dim)
    values = model.patch_size**2 * 12  # per patch, of both sensors
    heads = 3 * 2 * BATCH * (model.num_patches // 2) * model.decoder_embed_dim * values
    if model.common_decoder:
        assert whole - no_cmr == whole - no_umr == heads, "both losses share the trunk's passes"
    else:
        assert whole - no_cmr == whole - no_umr == (whole - alone) // 2, "each loss has its own passes"


def test_a_block_computes_a_query_slice_as_in_the_full_output() -> None:
    block, table = Block(16, 2, qkv_bias=True), torch.randn(7, 16)
    rows = torch.tensor([[0, 1, 4, 5], [2, 3, 5, 6]])
    full = block(table[rows])
    torch.testing.assert_close(block(table[rows], query_slice=slice(1, 3)), full[:, 1:3])
    torch.testing.assert_close(block(table, rows), full)
    torch.testing.assert_close(block(table, rows, slice(2, None)), full[:, 2:])


def test_mask_tokens_are_projected_once() -> None:
    """The decoder's first block computes queries, keys and values of the removed patches once for all images."""
    model = tiny("cecd", decoder_depth=2)
    decoder = CSMAE(model, Masking(), Loss()).decoders["common"]
    flops = []
    for images in (2, 3):
        tokens = {s: torch.randn(images, 1 + model.num_patches // 2, model.embed_dim) for s in ("s1", "s2")}
        masks = draw_masks(torch.rand(images, model.num_patches), torch.empty(0), Masking(strategy="identical"))
        with FlopCounterMode(display=False) as counter:
            decoder(tokens, masks)
        flops.append(counter.get_total_flops())
    width, visible, num_tokens = model.decoder_embed_dim, 1 + model.num_patches // 2, 1 + model.num_patches
    embedding = 2 * visible * width * model.embed_dim
    projections = 2 * visible * 3 * width**2
    others = 2 * num_tokens * 9 * width**2 + 4 * num_tokens**2 * width
    assert flops[1] - flops[0] == 2 * (embedding + projections + others)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_float32_in_every_precision(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = CSMAE(tiny("sesd"), Masking(), Loss(mde_weight=1, temperature=0.05)), batch(size=8)
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        terms, features = model(*inputs), model.features(*inputs)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    expected = nt_xent(features[0].float(), features[1].float(), 0.05)
    torch.testing.assert_close(terms["mim"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_trains_like_single_precision(precision: str) -> None:
    single, half = (list(pretrain(small_config(train__epochs=2, train__precision=p))) for p in ("fp32", precision))
    for a, b in zip(single, half, strict=True):
        assert b.metrics["train/loss"] == pytest.approx(a.metrics["train/loss"], rel=2e-3)


def test_compiling_without_a_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"^train.compile needs a C\+\+ compiler, .* or set it to false$"):
        next(pretrain(small_config(train__compile=True)))


@pytest.mark.slow
def test_compiled_trials_of_several_architectures_compute_the_same_losses() -> None:
    for more in ({}, {"model__embed_dim": 60, "model__variant": "cecd", "model__sensor_depth": 0}):
        eager, compiled = (list(pretrain(small_config(**more, train__compile=on))) for on in (False, True))
        for a, b in zip(eager, compiled, strict=True):
            assert b.metrics["train/loss"] == pytest.approx(a.metrics["train/loss"], rel=1e-4)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Torch's counters of compiled graphs; generating their code is skipped, because it takes half a minute."""
    monkeypatch.setattr(
        Block, "compile", lambda block, dynamic: nn.Module.compile(block, backend="eager", dynamic=dynamic)
    )
    counters.clear()
    yield counters
    torch.compiler.reset()


MANY_SHAPES = {
    "model__decoder_depth": 3,
    "model__pooling": "cls",
    "masking__strategy": "disjoint",
    "masking__ratio": 0.7,
    "masking__reconstruction": "identical",
    "optim__micro_batch_size": 3,
    "train__precision": "bf16",
    "train__epochs": 2,
    "data__synthetic__num_train": 8,
}
"""Sensors of different lengths, several query slices, passes with and without gradients."""


def test_every_shape_of_a_training_is_compiled_once(graphs: dict[str, Any]) -> None:
    """All blocks share one code object; torch's default compiles eight shapes of it and runs others uncompiled."""
    compiled = [graphs["stats"]["unique_graphs"] for _ in pretrain(small_config(**MANY_SHAPES, train__compile=True))]
    assert not graphs["unimplemented"], "a shape is not compiled"
    assert 8 < compiled[0] < RECOMPILE_LIMIT / 2
    assert compiled == [compiled[0]] * 2, "later epochs have no new shapes"


def test_scores_and_pictures_compile_nothing(graphs: dict[str, Any], tmp_path: Path) -> None:
    config = small_config(train__compile=True, train__epochs=2, data__synthetic__num_train=8)
    list(pretrain(config.model_copy(update={"eval": config.eval.model_copy(update={"every": 2})})))
    alone = graphs["stats"]["unique_graphs"]
    counters.clear()
    list(pretrain(config, tmp_path))
    assert (tmp_path / "arrays" / "epoch-0001.npz").exists()
    assert graphs["stats"]["unique_graphs"] == alone > 0


def test_running_out_of_memory_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    limit_memory(monkeypatch, 2)
    with caplog.at_level(logging.WARNING):
        assert next(pretrain(small_config())).metrics["train/micro_batch"] == 2
    messages = [f"out of memory: repeating the step with micro-batches of {size} pairs" for size in (4, 2)]
    assert [record.getMessage() for record in caplog.records] == messages


def test_an_epoch_reports_its_time_and_the_cost_of_a_pair() -> None:
    metrics = next(pretrain(small_config())).metrics
    assert metrics["time/worker_s"] >= metrics["time/epoch_s"] + metrics["time/eval_s"]
    assert {"cost/params", "cost/flops", "cost/activation_bytes"} <= set(metrics)
    config = small_config()
    assert metrics["cost/params"] == sum(
        p.numel() for p in CSMAE(config.model, config.masking, config.loss).parameters()
    )
    smaller = Model.model_validate(config.model.model_dump() | {"decoder_depth": 1, "decoder_embed_dim": 32})
    cheaper = next(pretrain(config.model_copy(update={"model": smaller}))).metrics
    assert cheaper["cost/flops"] < metrics["cost/flops"]


def test_scores_are_computed_with_a_torch_without_set_stance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.compiler, "set_stance")  # as before torch 2.6
    train_step = TrainStep.__new__(TrainStep)
    train_step.compiled = True
    with train_step.uncompiled():
        assert torch.compiler.is_compiling() is False
