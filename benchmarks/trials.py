"""Memory of one process that trains one architecture after another, as a warm worker does.

One JSON line: resident memory in MiB after each trial, its growth over the second half, and seconds a trial. With
``--search`` the trials are those of a search, in its warm groups of one worker: then it is the most that the trial's process
took until then.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch._dynamo.utils import counters

from csmae.cluster.resources import allocate, local_resources
from csmae.cluster.session import ray_running
from csmae.config import Config
from csmae.study.study import load_study
from csmae.training.trainer import pretrain
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.driver import run_search
from csmae.tuning.events import EpochReported, SearchEvent, TrialEnded, TrialStarted

VARIANTS, WIDTHS, PATCHES, RATIOS = ("sesd", "cecd", "secd", "cesd"), (96, 60, 144), (30, 24, 40), (0.5, 0.75, 0.3)


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30, help="at least 2")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--search", action="store_true")
    options = parser.parse_args()
    if not options.search:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
    memory, taken = (search if options.search else one_process)(options.compile, options.trials)
    half = memory[-max(2, len(memory) // 2) :]
    growth = statistics.linear_regression(range(len(half)), half).slope
    result: dict[str, Any] = {"compile": options.compile, "trials": options.trials, "rss_mib": memory}
    result |= {"mib_a_trial": round(growth, 2), "median_s": round(statistics.median(taken), 2)}
    print(json.dumps(result))


def one_process(compiled: bool, trials: int) -> tuple[list[float], list[float]]:
    """MiB after each trial, and its seconds."""
    memory, taken = [], []
    for number, config in enumerate(configs(compiled, trials)):
        start = time.perf_counter()
        for _ in pretrain(config):
            pass
        gc.collect()
        taken.append(time.perf_counter() - start)
        memory.append(resident_mib())
        assert number or compiled == bool(counters["stats"]["unique_graphs"]), "--compile was not followed"
    return memory, taken


def search(compiled: bool, trials: int) -> tuple[list[float], list[float]]:
    """The same of a search's trials, in the order of their ends."""
    space = {"variant": VARIANTS, "embed_dim": WIDTHS, "patch_size": PATCHES}
    settings = {
        "base": base(compiled),
        "space": {f"model.{name}": {"choice": list(values)} for name, values in space.items()},
        "search": {"num_trials": trials, "workers_per_trial": 1, "sampler": "random", "strategy": "none"},
    }
    memory: list[float] = []
    taken: list[float] = []
    began: dict[int, float] = {}
    most: dict[int, float] = {}

    def listen(event: SearchEvent) -> None:
        match event:
            case TrialStarted(number):
                began[number] = time.perf_counter()
            case EpochReported(number, _, metrics):
                most[number] = round(metrics["system/rss_mb"], 1)
            case TrialEnded(number, TrialStatus.COMPLETE):
                memory.append(most[number])
                taken.append(time.perf_counter() - began[number])

    resources = local_resources()
    with tempfile.TemporaryDirectory() as name, ray_running(None, resources, verbose=False):
        path = Path(name) / "memory.yaml"
        path.write_text(yaml.safe_dump(settings))
        study = load_study(path)
        run_search(Budget(TrialStore(study, Path(name))), allocate(study.search, resources), listen)
    return memory, taken


def base(compiled: bool) -> dict[str, Any]:
    """What all trials share."""
    return {
        "data": {"synthetic": {"num_train": 32, "num_validation": 24, "num_test": 16}},
        "model": {"size": "nano"},
        "optim": {"batch_size": 8, "warmup_epochs": 0},
        "train": {"epochs": 2, "compile": compiled},
        "eval": {"k": 3},
    }


def configs(compiled: bool, trials: int) -> list[Config]:
    """Changing architectures and masks."""
    shapes = itertools.cycle(itertools.product(WIDTHS, PATCHES, RATIOS, VARIANTS))
    values = itertools.islice(shapes, 0, None, 7)  # neighbors differ in everything
    return [
        Config.model_validate(
            {
                **base(compiled),
                "model": {"size": "nano", "variant": variant, "embed_dim": width, "patch_size": patch},
                "masking": {"ratio": ratio},
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
