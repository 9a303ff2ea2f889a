"""A thousand trials with an epoch that takes no time: the driver's work per report must not grow.

With ``--objectives 2`` trials are also judged by what a step costs, and compare by Pareto front.

The real driver, searcher, scheduler, database, MLflow outbox and a real Ray; only the training is a stub. One JSON line:
the driver's CPU milliseconds per report in the first and the last tenth of the search, what a trial's end and proposal
cost likewise, the driver's resident memory at both ends, and what MLflow did not have two minutes after the end.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from csmae.cli.explore import track
from csmae.cluster.resources import allocate, local_resources
from csmae.cluster.session import ray_running
from csmae.config import Config
from csmae.study.study import load_study
from csmae.tracking.tracker import Tracker
from csmae.training.trainer import Epoch
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.driver import run_search
from csmae.tuning.events import EpochReported, SearchEvent, TrialEnded

STUDY: dict[str, Any] = {
    "base": {"model": {"size": "nano"}, "train": {"epochs": 9}, "optim": {"warmup_epochs": 0}},
    "space": {
        "masking.ratio": {"float": [0.2, 0.8]},
        "optim.lr": {"float": [1e-5, 1e-2], "log": True},
        "loss.mim_weight": {"float": [0.0, 4.0]},
        "loss.temperature": {"float": [0.05, 1.0], "when": {"loss.mim_weight": "> 0"}},
    },
}


def instant(
    config: Config,
    run_dir: Path,
    device: str,
    on_step: Callable[[int, int], bool | None],
    until: int | None = None,
    parent_dir: Path | None = None,
) -> Iterator[Epoch]:
    """A curve that depends on the configuration, without any training; a resumed one begins again at its first epoch."""
    noise = random.Random(config.model_dump_json())
    height = 0.5 - (config.masking.ratio - 0.6) ** 2 - 0.01 * math.log10(config.optim.lr / 1e-3) ** 2
    for epoch in range(1, (until or config.train.epochs) + 1):
        score = height * (1 - 0.6**epoch) + noise.gauss(0, 0.005)
        yield Epoch(epoch, {"val/f1_mean": score, "train/loss": 1 / epoch, "cost/flops": config.masking.ratio})


class Meter:
    """Tells each event to MLflow's outbox, and notes the process's CPU time and memory."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.marks: list[tuple[SearchEvent, float, float]] = []

    def __call__(self, event: SearchEvent) -> None:
        """Tell and note an event."""
        track(self.tracker, event)
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        self.marks.append((event, time.process_time(), memory))

    def milliseconds(self, kind: type[SearchEvent], part: slice) -> float:
        """Mean CPU time from the event before to an event of a kind, over a part of the search."""
        spent = [
            after[1] - before[1]
            for before, after in zip(self.marks, self.marks[1:], strict=False)
            if isinstance(after[0], kind)
        ]
        chosen = spent[part]
        return round(1000 * sum(chosen) / len(chosen), 2)


def main() -> None:
    """Run the search and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-trials", type=int, default=1000)
    parser.add_argument("--objectives", type=int, choices=(1, 2), default=1)
    options = parser.parse_args()
    if options.objectives == 2:
        STUDY["search"] = {"objectives": {"val/f1_mean": "maximize", "cost/flops": "minimize"}}
    resources, start = local_resources(), time.monotonic()
    with tempfile.TemporaryDirectory() as name, ray_running(None, resources, verbose=False):
        folder = Path(name)
        (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
        study = load_study(folder / "study.yaml", assignments=[f"search.num_trials={options.num_trials}"])
        trial_store = TrialStore(study, folder)
        tracker = Tracker(trial_store.folder, study.name, f"sqlite:///{folder}/mlflow.db")
        tracker.start({}, {}, "val/f1_mean", "maximize")
        meter = Meter(tracker)
        run_search(Budget(trial_store), allocate(study.search, resources), meter, "scale:instant")
        left = tracker.close(120)
    tenth = options.num_trials // 10
    first, last = slice(0, tenth), slice(-tenth, None)
    print(
        json.dumps(
            {
                "report_ms": [meter.milliseconds(EpochReported, first), meter.milliseconds(EpochReported, last)],
                "end_ms": [meter.milliseconds(TrialEnded, first), meter.milliseconds(TrialEnded, last)],
                "memory_mib": [round(meter.marks[len(meter.marks) // 10][2]), round(meter.marks[-1][2])],
                "trials": sum(isinstance(event, TrialEnded) for event, _, _ in meter.marks),
                "not_uploaded": left,
                "seconds": round(time.monotonic() - start),
            }
        )
    )


if __name__ == "__main__":
    main()
