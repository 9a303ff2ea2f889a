"""Speed of a training step beside a straightforward implementation of the same step, per variant.

One JSON line: for each setting and variant pairs/s of ours and of the straightforward step, their ratio, and the share
of the machine's matrix-multiply peak that ours reaches (FLOPs by torch's own counter).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from csmae.config import Config, Loss, Masking, Model
from csmae.model.csmae import CSMAE
from csmae.model.decoder import Decoder
from csmae.model.losses import nt_xent
from csmae.model.masking import draw_masks
from csmae.model.patches import patchify, take_rows

VARIANTS = ("cecd", "cesd", "secd", "sesd")


class Straightforward(nn.Module):
    """The step as one would write it down: each sensor by itself, each direction decoded, every patch predicted."""

    def __init__(self, model: CSMAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, s1: Tensor, s2: Tensor, noise_s1: Tensor, noise_s2: Tensor) -> dict[str, Tensor]:
        """The same loss as ``CSMAE.forward``."""
        images, model = {"s1": s1, "s2": s2}, self.model
        patches = {s: patchify(image, model.patch_size) for s, image in images.items()}
        masks = draw_masks(noise_s1, noise_s2, model.masking)
        tokens = {s: self._encode(s, patches[s], masks[s].keep_bk) for s in images}
        total = nt_xent(model.encoder.pool(tokens["s1"]), model.encoder.pool(tokens["s2"]), model.loss.temperature)
        for source in images:
            for target in images:
                decoder = model.decoders["common" if "common" in model.decoders else target]
                assert isinstance(decoder, Decoder)
                decoded = decoder({source: tokens[source]}, masks)[source]
                error = (decoder.predict(decoded, target) - patches[target]).square().mean(dim=-1)
                removed = masks[source].removed_bl
                total = total + (error * removed).sum() / removed.sum()
        return {"loss": total}

    def _encode(self, sensor: str, patches: Tensor, keep: Tensor) -> Tensor:
        encoder = self.model.encoder
        tokens = take_rows(encoder.patch_embed[sensor](patches) + encoder.positions[1:], keep)
        cls = (encoder.cls_token[sensor] + encoder.positions[:1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls.to(tokens.dtype), tokens], dim=1)
        if sensor in encoder.sensor_blocks:
            tokens = encoder.sensor_norm[sensor](encoder.sensor_blocks[sensor](tokens))
        out: Tensor = encoder.norm(encoder.cross_blocks(tokens))
        return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the median counts")
    parser.add_argument("--batch", type=int, default=32, help="pairs a step")
    parser.add_argument("--gpu", action="store_true", help="ViT-base in 16 bit on the first GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if options.gpu else "cpu")
    precision = torch.bfloat16 if options.gpu else torch.float32
    peak = matmul_peak(device, precision)
    sizes = (
        {"base": ("base", {})} if options.gpu else {"tiny": ("tiny", {}), "quickstart": ("nano", {"patch_size": 30})}
    )
    result: dict[str, Any] = {
        "peak_gflops": round(peak / 1e9, 1),
        "batch": options.batch,
        "threads": torch.get_num_threads(),
    }
    for name, (size, more) in sizes.items():
        for variant in VARIANTS:
            model = Model.model_validate({"size": size, "variant": variant, **more})
            result[f"{name}/{variant}"] = measure(model, options, device, precision, peak)
    print(json.dumps(result))


def measure(
    architecture: Model, options: argparse.Namespace, device: torch.device, precision: torch.dtype, peak: float
) -> dict[str, float]:
    """Both steps in turn, round by round, so that a drift of the machine meets both."""
    torch.manual_seed(0)
    config = Config(model=architecture, masking=Masking(), loss=Loss())
    ours = CSMAE(config.model, config.masking, config.loss).to(device)
    plain = Straightforward(ours)
    batch = options.batch
    inputs = [torch.randn(batch, c, 120, 120, device=device) for c in (2, 10)]
    inputs += list(torch.rand(2, batch, architecture.num_patches, device=device))
    a, b = ours(*inputs)["loss"].item(), plain(*inputs)["loss"].item()
    assert abs(a - b) <= 1e-4 * abs(b), f"the two steps compute different losses: {a} and {b}"

    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-9)

    def step(model: nn.Module) -> None:
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            loss = model(*inputs)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step(ours)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    step(plain)
    for _ in range(options.rounds):
        times["ours"].append(seconds(lambda: step(ours), device))
        times["plain"].append(seconds(lambda: step(plain), device))
    fast, slow = (statistics.median(times[name]) for name in ("ours", "plain"))
    flops = counter.get_total_flops()
    return {
        "ours": round(batch / fast, 2),
        "straightforward": round(batch / slow, 2),
        "ratio": round(statistics.median(p / o for o, p in zip(times["ours"], times["plain"], strict=True)), 3),
        "gflops": round(flops / fast / 1e9, 1),
        "peak_share": round(flops / fast / peak, 3),
    }


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_peak(device: torch.device, precision: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a large matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=precision)
    torch.mm(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device) for _ in range(8))


if __name__ == "__main__":
    main()
