"""How a training step scales from one worker to two, one thread each, every worker with the same share of pairs.

One JSON line: for each size ``one``, ``two`` and ``apart``, pairs/s of one worker alone, of two together and of two that train
side by side without exchanging anything; ``scaling``, two over twice one, and ``machine``, the same of those apart: what the
cores and their memory allow. All take turns; each figure is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from csmae.config import Config
from csmae.model.csmae import CSMAE
from csmae.training.step import Stepper

SIZES: dict[str, dict[str, Any]] = {"tiny": {"size": "tiny"}, "quickstart": {"size": "nano", "patch_size": 30}}

SHARES = {"tiny": 32, "quickstart": 8}
"""Pairs of a worker: half of what the published batch gives two workers, and what the quickstart does."""

STEPS = {"tiny": 1, "quickstart": 40}
"""Timed steps of a turn."""

WAYS = {"one": (1, 1), "two": (2, 2), "apart": (2, 1)}
"""Processes, and how many of them make a group."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    result: dict[str, Any] = {"pairs_of_a_worker": SHARES, "turns": options.turns}
    for size in SIZES:
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.turns):
            for way, (processes, workers) in WAYS.items():
                found[way].append(pairs_per_s(size, processes, workers))
        result[size] = {way: round(statistics.median(speeds), 2) for way, speeds in found.items()}
        for name, way in (("scaling", "two"), ("machine", "apart")):
            ratios = [both / one / 2 for both, one in zip(found[way], found["one"], strict=True)]
            result[size][name] = round(statistics.median(ratios), 3)
    print(json.dumps(result))


def pairs_per_s(size: str, processes: int, workers: int) -> float:
    """Speed of new processes, of which so many make a group."""
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        spawn(work, (workers, port, size, folder), nprocs=processes)
        return sum(SHARES[size] / float(path.read_text()) for path in Path(folder).iterdir())


def work(rank: int, workers: int, port: int, size: str, folder: str) -> None:
    """One worker: warm up, then time each step."""
    torch.set_num_threads(1)
    if workers > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    share = SHARES[size]
    config = Config.model_validate({"model": SIZES[size], "optim": {"batch_size": share * workers}})
    torch.manual_seed(0)
    step = Stepper(CSMAE(config.model, config.masking, config.loss), config, None)
    s1, s2 = torch.randn(share, 2, 120, 120), torch.randn(share, 10, 120, 120)
    noise = torch.rand(2, share, config.model.num_patches)
    step(lambda rows: (s1[rows], s2[rows]), noise)
    taken = []
    for _ in range(STEPS[size]):
        start = time.perf_counter()
        step(lambda rows: (s1[rows], s2[rows]), noise)
        taken.append(time.perf_counter() - start)
    (Path(folder) / str(rank)).write_text(str(statistics.median(taken)))
    if workers > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
