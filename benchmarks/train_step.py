"""Speed of a training step compared with a straightforward implementation of the same step, per variant.

Prints one JSON line. For each size and variant: pairs/s of ``ours`` and of the ``straightforward`` step, the median of their
ratio per round, and the fraction of the machine's matrix-multiply peak (the fastest large product between the rounds) that
ours reaches; its FLOPs are counted by torch. With ``--compile``, also ours with ``train.compile``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csmae.config import Loss, Masking, Model, Optim
from csmae.model.csmae import CSMAE
from csmae.model.decoder import Decoder
from csmae.model.losses import nt_xent
from csmae.model.masking import draw_masks
from csmae.model.patches import patchify
from csmae.training.optim import make_optimizer
from csmae.training.train_step import compile_blocks

VARIANTS = ("cecd", "cesd", "secd", "sesd")

CPU_SIZES: dict[str, dict[str, Any]] = {"tiny": {"size": "tiny"}, "quickstart": {"size": "nano", "patch_size": 30}}

PRODUCT = 3072
"""Rows and columns of the matrix product that measures the machine's peak."""


class Straightforward(nn.Module):
    """The loss without optimizations: encodes each sensor separately, decodes each direction, predicts every patch."""

    def __init__(self, model: CSMAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, s1: Tensor, s2: Tensor, noise_s1: Tensor, noise_s2: Tensor) -> dict[str, Tensor]:
        """The same loss as ``CSMAE.forward``."""
        images, model = {"s1": s1, "s2": s2}, self.model
        patches = {s: patchify(image, model.patch_size) for s, image in images.items()}
        masks = draw_masks(noise_s1, noise_s2, model.masking)
        tokens = {s: self._encode(s, patches[s], masks[s].ids_keep_bk) for s in images}
        total = nt_xent(model.encoder.pool(tokens["s1"]), model.encoder.pool(tokens["s2"]), model.loss.temperature)
        for source in images:
            for target in images:
                decoder = model.decoders["common" if "common" in model.decoders else target]
                assert isinstance(decoder, Decoder)
                predicted = self._decode(decoder, tokens[source], masks[source].ids_restore_bl, target)
                error = (predicted - patches[target]).square().mean(dim=-1)
                removed = masks[source].mask_bl
                total = total + (error * removed).sum() / removed.sum()
        return {"loss": total}

    def _encode(self, sensor: str, patches: Tensor, keep: Tensor) -> Tensor:
        encoder = self.model.encoder
        tokens = gather_rows(encoder.patch_embed[sensor](patches) + encoder.positions[1:], keep)
        cls = (encoder.cls_token[sensor] + encoder.positions[:1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls.to(tokens.dtype), tokens], dim=1)
        if sensor in encoder.sensor_blocks:
            tokens = encoder.sensor_norm[sensor](encoder.sensor_blocks[sensor](tokens))
        out: Tensor = encoder.norm(encoder.cross_blocks(tokens))
        return out

    def _decode(self, decoder: Decoder, tokens: Tensor, restore: Tensor, target: str) -> Tensor:
        embedded = decoder.embed(tokens)
        hidden = decoder.mask_token.expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = gather_rows(torch.cat([embedded[:, 1:], hidden.to(embedded.dtype)], dim=1), restore)
        whole = torch.cat([embedded[:, :1], patches], dim=1) + decoder.positions
        return decoder.predict(decoder.norm(decoder.blocks(whole)[:, 1:]), target)


def gather_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Select tokens of each image with ``gather``, as masked autoencoders usually do."""
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds; ten times as many for the quickstart size")
    parser.add_argument("--batch", type=int, default=16, help="pairs per step")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--compile", action="store_true", help="also measure train.compile")
    parser.add_argument(
        "--gpu", action="store_true", help="ViT-base on the first GPU: ours in bf16, straightforward in fp16"
    )
    options = parser.parse_args()
    sizes = {"base": {"size": "base"}} if options.gpu else CPU_SIZES
    result: dict[str, Any] = {"batch": options.batch, "threads": torch.get_num_threads()}
    # One process each: memory that a process has freed makes later allocations faster.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, size in sizes.items():
            for variant in options.variants:
                rounds = options.rounds * (10 if name == "quickstart" else 1)
                architecture = Model.model_validate({**size, "variant": variant})
                result[f"{name}/{variant}"] = pool.apply(measure, (architecture, options, rounds))
    print(json.dumps(result))


def measure(architecture: Model, options: argparse.Namespace, rounds: int) -> dict[str, float]:
    """Time all steps in turn, round by round, so that changes of the machine's speed affect all of them."""
    torch.manual_seed(0)
    device = torch.device("cuda" if options.gpu else "cpu")
    inputs = [torch.randn(options.batch, c, 120, 120, device=device) for c in (2, 10)]
    inputs += list(torch.rand(2, options.batch, architecture.num_patches, device=device))
    models = {
        name: CSMAE(architecture, Masking(), Loss()).to(device) for name in ("ours", "straightforward", "compiled")
    }
    for model in models.values():
        model.load_state_dict(models["ours"].state_dict())
    a, b = models["ours"](*inputs)["loss"].item(), Straightforward(models["straightforward"])(*inputs)["loss"].item()
    assert abs(a - b) <= 1e-4 * abs(b), f"the two steps compute different losses: {a} and {b}"

    fast = torch.bfloat16 if options.gpu else torch.float32
    steps = {
        "ours": Step(models["ours"], inputs, fast),
        "straightforward": Step(
            Straightforward(models["straightforward"]), inputs, torch.float16 if options.gpu else fast
        ),
    }
    if options.compile:
        compile_blocks(models["compiled"])
        steps["compiled"] = Step(models["compiled"], inputs, fast)
    with FlopCounterMode(display=False) as counter:
        steps["ours"]()
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in [*steps, "product"]}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
        times["product"].append(product_seconds(device, fast))
    return figures(times, options.batch, counter.get_total_flops())


def figures(times: dict[str, list[float]], batch: int, flops: int) -> dict[str, float]:
    """Pairs/s from the median time, the median ratio per round, and the fraction of the peak."""
    peak = 2 * PRODUCT**3 / min(times.pop("product"))
    ratios = [plain / ours for ours, plain in zip(times["ours"], times["straightforward"], strict=True)]
    result = {name: round(batch / statistics.median(values), 2) for name, values in times.items()}
    peak_fraction = flops / statistics.median(times["ours"]) / peak
    return result | {
        "ratio": round(statistics.median(ratios), 3),
        "peak_fraction": round(peak_fraction, 3),
        "gflops": round(peak_fraction * peak / 1e9, 1),
        "peak_gflops": round(peak / 1e9, 1),
    }


class Step:
    """Forward pass, backward pass and optimizer step, as ``TrainStep`` does them."""

    def __init__(self, model: nn.Module, inputs: list[Tensor], precision: torch.dtype) -> None:
        self.model, self.inputs, self.precision = model, inputs, precision
        self.device = inputs[0].device
        self.optimizer = make_optimizer(model, Optim(lr=1e-9))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision is torch.float16)

    def __call__(self) -> None:
        """Take one step."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32):
            loss = self.model(*self.inputs)["loss"]
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def product_seconds(device: torch.device, precision: torch.dtype) -> float:
    """Wall time of a large matrix product after warm-up."""
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=device, dtype=precision)
    torch.mm(a[:64], b)
    return seconds(lambda: torch.mm(a, b), device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
