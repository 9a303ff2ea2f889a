"""Scaling of a training step from one DDP worker to two, with one thread and the same number of pairs per worker.

Prints one JSON line. For each size: pairs/s of ``one`` worker, of ``two`` DDP workers, and of two ``independent`` processes
that exchange nothing; ``scaling``, two over twice one; ``machine``, independent over twice one, which is the limit set by cores
and memory. All settings take turns; each figure is the median over the turns.
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
from csmae.training.train_step import TrainStep

SIZES: dict[str, dict[str, Any]] = {"tiny": {"size": "tiny"}, "quickstart": {"size": "nano", "patch_size": 30}}

PAIRS_PER_WORKER = {"tiny": 32, "quickstart": 8}
"""Half of the published batch on two workers, and the quickstart's batch."""

STEPS = {"tiny": 1, "quickstart": 40}
"""Timed steps per turn."""

SETTINGS = {"one": (1, 1), "two": (2, 2), "independent": (2, 1)}
"""Number of processes and world size."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    result: dict[str, Any] = {"pairs_per_worker": PAIRS_PER_WORKER, "turns": options.turns}
    for size in SIZES:
        speeds: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
        for _ in range(options.turns):
            for setting, (processes, world_size) in SETTINGS.items():
                speeds[setting].append(pairs_per_s(size, processes, world_size))
        result[size] = {setting: round(statistics.median(values), 2) for setting, values in speeds.items()}
        for name, setting in (("scaling", "two"), ("machine", "independent")):
            ratios = [both / one / 2 for both, one in zip(speeds[setting], speeds["one"], strict=True)]
            result[size][name] = round(statistics.median(ratios), 3)
    print(json.dumps(result))


def pairs_per_s(size: str, processes: int, world_size: int) -> float:
    """Total speed of new processes."""
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        spawn(work, (world_size, port, size, folder), nprocs=processes)
        return sum(PAIRS_PER_WORKER[size] / float(path.read_text()) for path in Path(folder).iterdir())


def work(rank: int, world_size: int, port: int, size: str, folder: str) -> None:
    """Warm up one worker, then time each step."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    num_pairs = PAIRS_PER_WORKER[size]
    config = Config.model_validate({"model": SIZES[size], "optim": {"batch_size": num_pairs * world_size}})
    torch.manual_seed(0)
    step = TrainStep(CSMAE(config.model, config.masking, config.loss), config, None)
    s1, s2 = torch.randn(num_pairs, 2, 120, 120), torch.randn(num_pairs, 10, 120, 120)
    noise = torch.rand(2, num_pairs, config.model.num_patches)
    step(lambda rows: (s1[rows], s2[rows]), noise)
    seconds = []
    for _ in range(STEPS[size]):
        start = time.perf_counter()
        step(lambda rows: (s1[rows], s2[rows]), noise)
        seconds.append(time.perf_counter() - start)
    (Path(folder) / str(rank)).write_text(str(statistics.median(seconds)))
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
