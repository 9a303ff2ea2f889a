"""How long a trial waits for its first step after the one before: in a warm group, and with a trainer per trial.

Both patterns train the same small configuration with two workers on the same Ray, one trial after another. Measured
from the last trial's end in rank 0 to the end of the next trial's first step. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from ray import tune
from ray.tune import PlacementGroupFactory

from csmae.cluster.resources import Allocation, ClusterResources, allocate
from csmae.cluster.session import ray_running
from csmae.config import Config
from csmae.study.study import Study, load_study
from csmae.training.trainer import Epoch, pretrain
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.driver import run_search
from csmae.workers.group import TRAINABLE_RESOURCES, make_trainer
from csmae.workers.spec import WorkerGroupSpec

STUDY = {
    "base": {
        "data": {"synthetic": {"num_train": 64, "num_validation": 48, "num_test": 32}},
        "model": {"size": "nano", "patch_size": 30, "sensor_depth": 1, "cross_depth": 1},
        "optim": {"batch_size": 16, "warmup_epochs": 0, "lr": 1e-3},
        "train": {"epochs": 2},
        "eval": {"k": 3},
    },
    "space": {"masking.ratio": {"float": [0.3, 0.7]}},
    "search": {"workers_per_trial": 2, "sampler": "random", "strategy": "none"},
}

RESOURCES = ClusterResources(((2, 0),), "this machine")


def timed(
    config: Config,
    run_dir: Path,
    device: str,
    on_step: Callable[[int, int], bool | None],
    until: int | None = None,
    parent_dir: Path | None = None,
) -> Iterator[Epoch]:
    """The training, noting when its first step and the whole of it were done."""
    times: list[float] = []

    def note(done: int, total: int) -> None:
        times.append(time.time())
        on_step(done, total)

    yield from pretrain(config, run_dir, device, note, until, parent_dir)
    if dist.get_rank() == 0:
        (run_dir / "times.json").write_text(json.dumps([times[0], time.time()]))


def warm(study: Study, folder: Path) -> float:
    """Median wait between the trials of a search."""
    trial_store = TrialStore(study, folder)
    run_search(Budget(trial_store), allocate(study.search, RESOURCES), lambda event: None, "turnaround:timed")
    return median_wait(trial_store.folder)


def stock(study: Study, folder: Path) -> float:
    """Median wait between the trials of a Tune function that builds a ``TorchTrainer`` each time."""
    spec = WorkerGroupSpec(Allocation(1, study.search.workers_per_trial, 1.0, 0.0), 0, math.inf, str(folder / "train"))
    config = study.resolve({}).model_dump(mode="json")

    def trial(point: dict[str, Any]) -> None:
        run_dir = str(folder / "trials" / str(point["number"]))
        make_trainer(train_alone, {"config": config, "run_dir": run_dir}, spec).fit()

    with contextlib.redirect_stdout(sys.stderr):  # Tune tells of each trial
        tune.Tuner(
            tune.with_resources(trial, PlacementGroupFactory([TRAINABLE_RESOURCES])),
            param_space={"number": tune.grid_search(list(range(study.search.num_trials)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        ).fit()
    return median_wait(folder)


def train_alone(setting: dict[str, Any]) -> None:
    """What a worker of a trainer of its own does."""
    for _ in timed(Config.model_validate(setting["config"]), Path(setting["run_dir"]), "cpu", lambda done, total: None):
        pass


def median_wait(folder: Path) -> float:
    """From each trial's end to the next one's first step, seconds."""
    times: list[list[float]] = sorted(json.loads(path.read_text()) for path in folder.glob("trials/*/times.json"))
    waits = [after[0] - before[1] for before, after in itertools.pairwise(times)]
    print(f"{folder.name}: {', '.join(f'{wait:.2f}' for wait in waits)} s", file=sys.stderr)
    return statistics.median(waits)


def main() -> None:
    """Run both patterns and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--warm-trials", type=int, default=9)
    parser.add_argument("--stock-trials", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ray_running(None, RESOURCES, verbose=False):
        figures = {}
        for pattern, count in ((warm, options.warm_trials), (stock, options.stock_trials)):
            folder = Path(name) / pattern.__name__
            folder.mkdir()
            (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
            study = load_study(folder / "study.yaml", assignments=[f"search.num_trials={count}"])
            figures[f"{pattern.__name__}_s"] = round(pattern(study, folder), 3)
    print(json.dumps(figures | {"ratio": round(figures["stock_s"] / figures["warm_s"], 1)}))


if __name__ == "__main__":
    main()
