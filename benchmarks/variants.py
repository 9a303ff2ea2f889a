"""Train the four variants on the synthetic archive: losses of the first and last epoch, and retrieval scores.

Prints a Markdown table, then one JSON line. Each cell is the mean over the seeds, scores with the range of the seeds.
Cross-sensor F1 is the mean of s1_to_s2 and s2_to_s1, validation queries against the test archive.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from csmae.config import Config
from csmae.training.scoring import final_scores
from csmae.training.splits import validate_run
from csmae.training.trainer import pretrain

VARIANTS = ("cecd", "cesd", "secd", "sesd")

RECONSTRUCTION = ("train/umr_s1", "train/umr_s2", "train/cmr_s1_to_s2", "train/cmr_s2_to_s1")

Figures = dict[str, float]


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    runs = [config(variant, seed, options.epochs) for seed in range(options.seeds) for variant in VARIANTS]
    validate_run(runs[0])  # writes the archive once
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(figures, [run.model_dump_json() for run in runs], chunksize=1)
    by_variant: dict[str, list[Figures]] = {variant: [] for variant in VARIANTS}
    for run, result in zip(runs, results, strict=True):
        by_variant[run.model.variant].append(result)
    print(table(by_variant))
    print(
        json.dumps({"seeds": options.seeds, "epochs": options.epochs, **{v: means(f) for v, f in by_variant.items()}})
    )


def config(variant: str, seed: int, epochs: int) -> Config:
    """A very small network on 512 scenes."""
    return Config.model_validate(
        {
            "data": {"synthetic": {"num_train": 512, "num_validation": 256, "num_test": 256}},
            "model": {"size": "nano", "variant": variant, "patch_size": 30},
            "optim": {"batch_size": 16, "lr": 1e-3, "warmup_epochs": 2},
            "train": {"epochs": epochs, "seed": seed},
            "eval": {"every": epochs},
        }
    )


def figures(values: str) -> Figures:
    """Train and score one configuration with one thread."""
    torch.set_num_threads(1)
    run = Config.model_validate_json(values)
    with tempfile.TemporaryDirectory() as folder:
        epochs = [epoch.metrics for epoch in pretrain(run, Path(folder))]
        before, after = final_scores(run), final_scores(run, Path(folder) / "encoder")
    result = {}
    for name, metrics in (("first", epochs[0]), ("last", epochs[-1])):
        result[f"reconstruction_{name}"] = sum(metrics[term] for term in RECONSTRUCTION)
        result[f"mim_{name}"] = metrics["train/mim"]
    for name, scores in (("untrained", before), ("trained", after)):
        result[f"cross_{name}"] = 50 * (scores["test/f1/s1_to_s2"] + scores["test/f1/s2_to_s1"])
        result[f"mean_{name}"] = 100 * scores["test/f1_mean"]
    return result


def means(results: list[Figures]) -> Figures:
    """Means over the seeds."""
    return {name: round(statistics.mean(result[name] for result in results), 4) for name in results[0]}


def table(by_variant: dict[str, list[Figures]]) -> str:
    """A Markdown table with one row per variant."""
    lines = [
        "| Variant | Reconstruction, first → last epoch | MIM | Cross-sensor F1, untrained → trained | F1 of all directions |",
        "|---|---|---|---|---|",
    ]
    for variant, results in by_variant.items():
        mean: dict[str, Any] = means(results)
        losses = [f"{mean[f'{name}_first']:.3f} → {mean[f'{name}_last']:.3f}" for name in ("reconstruction", "mim")]
        scores = [f"{spread(results, f'{n}_untrained')} → {spread(results, f'{n}_trained')}" for n in ("cross", "mean")]
        lines.append(f"| {variant.upper()} | {' | '.join(losses + scores)} |")
    return "\n".join(lines)


def spread(results: list[Figures], name: str) -> str:
    """Mean and range over the seeds."""
    values = [result[name] for result in results]
    return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


if __name__ == "__main__":
    main()
