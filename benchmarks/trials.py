"""Memory of one process that trains one architecture after another, as a warm worker does.

One JSON line: resident memory in MiB after each trial, its growth over the second half, and seconds a trial.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from csmae.config import Config
from csmae.training.engine import pretrain

VARIANTS, WIDTHS, PATCHES, RATIOS = ("sesd", "cecd", "secd", "cesd"), (96, 60, 144), (30, 24, 40), (0.5, 0.75, 0.3)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30, help="at least 2")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    memory, taken = [], []
    for number, config in enumerate(configs(options.compile, options.trials)):
        start = time.perf_counter()
        for _ in pretrain(config):
            pass
        gc.collect()
        taken.append(time.perf_counter() - start)
        memory.append(resident_mib())
        assert number or options.compile == bool(counters["stats"]["unique_graphs"]), "--compile was not followed"
    half = memory[-max(2, len(memory) // 2) :]
    growth = statistics.linear_regression(range(len(half)), half).slope
    result: dict[str, Any] = {"compile": options.compile, "trials": options.trials, "rss_mib": memory}
    result |= {"mib_a_trial": round(growth, 2), "median_s": round(statistics.median(taken), 2)}
    print(json.dumps(result))


def configs(compiled: bool, trials: int) -> list[Config]:
    """Changing architectures and masks."""
    shapes = itertools.cycle(itertools.product(WIDTHS, PATCHES, RATIOS, VARIANTS))
    values = itertools.islice(shapes, 0, None, 7)  # neighbours differ in everything
    return [
        Config.model_validate(
            {
                "data": {"synthetic": {"num_train": 32, "num_validation": 24, "num_test": 16}},
                "model": {"size": "nano", "variant": variant, "embed_dim": width, "patch_size": patch},
                "masking": {"ratio": ratio},
                "optim": {"batch_size": 8, "warmup_epochs": 0},
                "train": {"epochs": 2, "compile": compiled},
                "eval": {"k": 3},
            }
        )
        for width, patch, ratio, variant in itertools.islice(values, trials)
    ]


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 2**20, 1)


if __name__ == "__main__":
    main()
