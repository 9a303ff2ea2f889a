"""What a search costs beside its trainings: wall time over the time that the workers spent on epochs.

Runs the quickstart's study with 24 trials on two workers and a real Ray, Optuna and outbox-free listener. Counted from
the first trial's start in the workers to the last one's end; the share of a trial's setup is told apart. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from csmae.cluster.resources import allocate, local_resources
from csmae.cluster.session import ray_running
from csmae.config import Config
from csmae.study.study import load_study
from csmae.training.trainer import Epoch, pretrain
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.driver import run_search

QUICKSTART = Path(__file__).resolve().parent.parent / "spaces" / "quickstart.yaml"


def clocked(
    config: Config,
    run_dir: Path,
    device: str,
    on_step: Callable[[int, int], bool | None],
    until: int | None = None,
    parent_dir: Path | None = None,
) -> Iterator[Epoch]:
    """The training, noting its start and end, and the seconds of its epochs."""
    start, busy = time.time(), 0.0
    try:
        for epoch in pretrain(config, run_dir, device, on_step, until, parent_dir):
            busy += epoch.metrics["time/epoch_s"] + epoch.metrics["time/eval_s"]
            yield epoch
    finally:
        if dist.get_rank() == 0:
            (run_dir / "clock.json").write_text(json.dumps([start, time.time(), busy]))


def main() -> None:
    """Run the search and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-trials", type=int, default=24)
    options = parser.parse_args()
    study = load_study(QUICKSTART, assignments=[f"search.num_trials={options.num_trials}"])
    resources = local_resources()
    with tempfile.TemporaryDirectory() as name, ray_running(None, resources, verbose=False):
        folder, allocation = Path(name), allocate(study.search, resources)
        run_search(Budget(TrialStore(study, folder)), allocation, lambda event: None, "search_overhead:clocked")
        clocks = [json.loads(path.read_text()) for path in folder.glob("*/trials/*/clock.json")]
    wall = max(end for _, end, _ in clocks) - min(start for start, _, _ in clocks)
    busy = sum(seconds for _, _, seconds in clocks) / allocation.max_concurrent
    inside = sum(end - start for start, end, _ in clocks) / allocation.max_concurrent
    figures = {"overhead": wall / busy, "outside_trials": wall / inside, "wall_s": wall, "epochs_s": busy}
    print(json.dumps({key: round(value, 3) for key, value in figures.items()} | {"trials": len(clocks)}))


if __name__ == "__main__":
    main()
