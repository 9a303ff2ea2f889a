"""How many epochs a search spends for a good encoder: tpe and random, each with and without early stopping.

First every point of a small grid is trained once on the synthetic archive, all its epochs; then each strategy searches
that table with many seeds, through the real trial store, samplers and stopping rules. Prints one JSON line: ``epochs_share`` is the
median over the seeds of the epochs that tpe+asha needs to reach random's final best, over the epochs that random spent;
null where it does not. Takes about a quarter of an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from csmae.config import Config
from csmae.study.study import Study, load_study
from csmae.training.trainer import DivergedError, pretrain
from csmae.trials.optuna_private import frozen_trial
from csmae.trials.store import TrialStore
from csmae.trials.trial import num_epochs
from csmae.tuning.planner import Planner
from csmae.tuning.strategy.base import Stop
from csmae.tuning.strategy.make import make_strategy

STUDY: dict[str, Any] = {
    "base": {
        "data": {"synthetic": {"num_train": 256, "num_validation": 192, "num_test": 16}},
        "model": {
            "variant": "cecd",
            "size": "nano",
            "img_size": 60,
            "patch_size": 15,
            "sensor_depth": 0,
            "cross_depth": 2,
        },
        "optim": {"batch_size": 8, "warmup_epochs": 1, "lr": 1e-4},
        "train": {"epochs": 27},
    },
    "space": {
        "optim.lr": {"choice": [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]},
        "masking.ratio": {"float": [0.2, 0.8], "step": 0.3},
        "loss.mim_weight": {"choice": [0.0, 0.25, 2.0]},
        "loss.temperature": {"choice": [0.2, 1.0], "when": {"loss.mim_weight": "> 0"}},
    },
    "search": {"grace_epochs": 3},  # as many as the losses need to leave their first plateau
}

STRATEGIES = {
    "tpe+asha": ("tpe", "asha"),
    "tpe": ("tpe", "none"),
    "random+asha": ("random", "asha"),
    "random": ("random", "none"),
}

Curve = list[tuple[int, float]]
"""Epochs spent so far and the best score that a trial had at its end, after each trial."""


def train_curve(config: Config) -> list[float]:
    """Scores of a configuration by epoch; 0 from where it diverged."""
    import torch

    torch.set_num_threads(1)
    scores: list[float] = []
    try:
        scores.extend(epoch.metrics["val/f1_mean"] for epoch in pretrain(config))
    except DivergedError:
        scores.extend([0.0] * (config.train.epochs - len(scores)))
    return scores


def train_table(study: Study, path: Path, processes: int) -> dict[str, list[float]]:
    """Curves of every point of the space, kept in a file, by the configuration as JSON."""
    table: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    missing = {config.model_dump_json(): config for config in map(study.resolve, study.space.grid())}
    missing = {key: config for key, config in missing.items() if key not in table}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for key, curve in zip(missing, pool.map(train_curve, missing.values()), strict=True):
            table[key] = curve
            path.write_text(json.dumps(table))
    return table


def search_table(study: Study, table: dict[str, list[float]], folder: Path) -> Iterator[tuple[int, float]]:
    """Search the table as a search with one trial at a time would; yields epochs spent and the best final score so far."""
    trial_store, spent, best = TrialStore(study, folder), 0, 0.0
    planner = Planner(trial_store, make_strategy(study))
    while decision := planner.next(any_running=False):
        if isinstance(decision, Stop):
            trial_store.stop(trial_store.paused_trial(decision.number), decision.reason)
            continue
        trial, curve = decision.trial, table[decision.config.model_dump_json()]
        for epoch in range(num_epochs(frozen_trial(trial)) + 1, decision.until + 1):
            spent, score = spent + 1, curve[epoch - 1]
            trial_store.record_epoch(trial, epoch, (score,))
            if not planner.should_continue(trial.number, epoch, (score,)):
                trial_store.stop(trial, "stopped by the strategy")
                break
        else:
            if decision.until < len(curve):
                trial_store.pause(trial, decision.until, {})
            else:
                trial_store.complete(trial, (score,))
                best = max(best, score)
        yield spent, best


def run_strategy(path: Path, table: dict[str, list[float]], epochs: int, name: str, seed: int) -> Curve:
    """A strategy with a seed, until it has spent its epochs."""
    sampler, strategy = STRATEGIES[name]
    settings = {"sampler": sampler, "strategy": strategy, "seed": seed, "num_trials": 999, "start_from": "[]"}
    study = load_study(path, assignments=[f"search.{key}={value}" for key, value in settings.items()])
    curve: Curve = []
    with tempfile.TemporaryDirectory() as folder:
        for spent, best in search_table(study, table, Path(folder)):
            curve.append((spent, best))
            if spent >= epochs:
                break
    return curve


def run_strategies(
    path: Path, table: dict[str, list[float]], seeds: int, epochs: int, processes: int
) -> dict[str, list[Curve]]:
    """Each strategy with each seed."""
    names, numbers = zip(*((name, 1000 * seed) for name in STRATEGIES for seed in range(seeds)), strict=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(partial(run_strategy, path, table, epochs), names, numbers))
    return {name: runs[i * seeds : (i + 1) * seeds] for i, name in enumerate(STRATEGIES)}


def epochs_to(curve: Curve, score: float) -> float:
    """Epochs until a score was reached; infinite where it never was."""
    return next((spent for spent, best in curve if best >= score), float("inf"))


def summary(curves: dict[str, list[Curve]], table: dict[str, list[float]]) -> dict[str, Any]:
    """The figures: share of random's epochs, and each strategy's median final best."""
    shares = [
        epochs_to(ours, random[-1][1]) / random[-1][0]
        for ours, random in zip(curves["tpe+asha"], curves["random"], strict=True)
    ]
    share = statistics.median(shares)
    finals = {name: round(statistics.median(curve[-1][1] for curve in runs), 4) for name, runs in curves.items()}
    top = max(curve[-1] for curve in table.values())
    return {
        "epochs_share": round(share, 3) if math.isfinite(share) else None,
        **finals,
        "table_best": round(top, 4),
        "seeds": len(shares),
    }


def plot(curves: dict[str, list[Curve]], path: Path, epochs: int) -> None:
    """Median best score against epochs spent, one line a strategy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    grid = range(9, epochs + 1)
    for name, runs in curves.items():
        at = [[max((b for s, b in curve if s <= x), default=0.0) for curve in runs] for x in grid]
        axes.plot(list(grid), [statistics.median(scores) or float("nan") for scores in at], label=name)
    axes.set(xlabel="epochs spent", ylabel="best val/f1_mean (median over seeds)")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Train the table, search it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=810, help="that each search may spend")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", type=Path, default=Path("build/search_efficiency.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/search_efficiency.png"))
    options = parser.parse_args()
    options.table.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
        table = train_table(load_study(path), options.table, options.processes)
        curves = run_strategies(path, table, options.seeds, options.epochs, options.processes)
    plot(curves, options.plot, options.epochs)
    print(json.dumps(summary(curves, table)))


if __name__ == "__main__":
    main()
