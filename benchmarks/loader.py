"""Measures how fast one core reads pairs: native batches, the whole CPU path, a conventional loader, and the upper bound.

Writes its own archives. Prints one JSON line; every figure is in pairs per second: the median over passes in turns, each
after an untimed one.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2 as transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from csmae.config import Data, Synthetic
from csmae.data.archive import open_archive
from csmae.data.loader import batches, epoch_rows
from csmae.data.split import Split
from csmae.data.synthetic.archive import synthesize
from csmae.data.synthetic.scenes import draw_scenes
from csmae.data.transforms import Preprocess
from csmae.sensors import S1_BANDS, S2_10M_BANDS, S2_20M_BANDS, S2_BANDS
from tests.support.v1_pickles import patch_interface, pickled, write_v1

PASSES = 9

NATIVE_BATCH, FULL_BATCH = 128, 32
"""Pairs per batch: as in training on a GPU, and few enough for the batch to fit in the cache."""


def write_archives(folder: Path, num_pairs: int) -> None:
    """Write synthetic scenes as v2 and as v1."""
    synthesize(Synthetic(num_train=num_pairs, num_validation=1, num_test=1), folder / "v2")
    random, patches = np.random.default_rng(0), {}
    for start in range(0, num_pairs, 32):
        scenes, _ = draw_scenes(random.integers(1, 13, 32), random)
        for number in range(32):
            s1, s2_10m, s2_20m = (images.numpy() for images in scenes.pair(number))
            bands = dict(zip((*S1_BANDS, *S2_10M_BANDS, *S2_20M_BANDS), (*s1, *s2_10m, *s2_20m), strict=True))
            bands |= {band: np.zeros((20, 20), np.uint16) for band in ("B01", "B09")}
            # In the order of BigEarthNet's encoder: B01 to B08, B8A, B09, B11, B12.
            ordered = {name: bands[name] for name in sorted(bands, key=lambda name: name.replace("8A", "085"))}
            patches[f"S2A_MSIL2A_20170613T101031_{start + number}_0"] = pickled(ordered, ["Pastures"])
    write_v1(folder / "v1", patches, {"train.csv": list(patches)[:num_pairs]})


def native(split: Split, epoch: int = 0) -> int:
    """Read batches as a GPU consumes them."""
    rows = epoch_rows(len(split), NATIVE_BATCH, 0, epoch)
    return sum(len(batch.s1) for batch in batches(split, rows))


def full(split: Split, preprocess: Preprocess) -> int:
    """Read batches as the network consumes them: normalized, mirrored, (12, 120, 120) per pair."""
    rows = epoch_rows(len(split), FULL_BATCH, 0, 0)
    flips = torch.rand(len(rows), FULL_BATCH, 2) < 0.5
    return sum(len(preprocess(batch, flip)[0]) for batch, flip in zip(batches(split, rows), flips, strict=True))


def copied(values: list[np.ndarray[Any, Any]], memory: np.ndarray[Any, Any]) -> int:
    """Copy the bytes of pairs into a batch."""
    for number, value in enumerate(values):
        memory[number % len(memory)] = value
    return len(values)


def read_v1(transaction: Any, name: str, s1_name: str) -> dict[str, Tensor]:
    """Read a pair's bands by unpickling the patch."""
    patch = pickle.loads(transaction.get(name.encode()))
    bands = {f"B{band}": getattr(patch.s2_patch, f"band{band}") for band in (name[1:] for name in S2_BANDS)}
    bands |= {band: getattr(patch.s1_patch, f"band{band}") for band in S1_BANDS}
    return {name: torch.from_numpy(band.data.astype(np.float32)) for name, band in bands.items()}


def read_v2(transaction: Any, name: str, s1_name: str) -> dict[str, Tensor]:
    """Read a pair's bands with the safetensors library."""
    bands = load(transaction.get(name.encode())) | load(transaction.get(s1_name.encode()))
    return {name: band.float() for name, band in bands.items()}


def conventional(split: Split, read: Callable[..., dict[str, Tensor]], count: int) -> int:
    """Read one pair at a time; interpolate each band, stack, transform and collate."""
    data = Data()
    transform = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.RandomVerticalFlip(),
            transforms.Normalize([*data.s2_mean, *data.s1_mean], [*data.s2_std, *data.s1_std]),
        ]
    )
    names = split.names[:count]
    s1_names = [split.lmdb.key(position) for position in split.sources[-1].positions[:count].tolist()]
    images: list[Tensor] = []
    with lmdb.open(str(split.lmdb.folder), readonly=True, lock=False, readahead=False) as environment:
        for name, s1_name in zip(names, s1_names, strict=True):
            with environment.begin() as transaction:
                bands = read(transaction, name, s1_name)
            resized = [
                interpolate(bands[band][None, None], size=(120, 120), mode="bicubic", align_corners=True)[0, 0]
                for band in (*S2_BANDS, *S1_BANDS)
            ]
            images.append(transform(torch.stack(resized)))
            if len(images) == FULL_BATCH:
                torch.stack(images)
                images.clear()
    return count


def cold(folder: Path) -> float:
    """Read native batches of an uncached archive; in a separate process, because mapped pages stay cached."""
    with next(folder.glob("*/data.mdb")).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--read", str(folder)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["native"][0])


def read(folder: Path, epochs: int) -> dict[str, list[float]]:
    """Read native batches of an existing archive; report the memory of this process after each epoch."""
    split = open_archive(Data(path=str(folder))).split("train")
    figures: dict[str, list[float]] = {"native": [], "anonymous_mb": []}
    for epoch in range(epochs):
        figures["native"].append(round(rate(partial(native, split, epoch)), 1))
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        figures["anonymous_mb"].append(round(int(status["RssAnon"].split()[0]) / 1024, 1))
    return figures


def rate(run_pass: Callable[[], int]) -> float:
    """Return pairs per second of one pass."""
    start = time.perf_counter()
    return run_pass() / (time.perf_counter() - start)


def steady_rate(run_pass: Callable[[], int]) -> float:
    """Return pairs per second of a pass immediately after another one, like epochs.

    Memory that is idle for seconds may leave the page tables; mapping it again would be measured, too.
    """
    run_pass()
    return rate(run_pass)


def measure(folder: Path, num_pairs: int) -> dict[str, float]:
    """Return medians by name; the passes alternate, so that a slow moment affects all figures."""
    write_archives(folder, num_pairs)
    # Uncached reads first: pages that this process has mapped stay in memory.
    colds = [{f"cold_{name}": cold(folder / name) for name in ("v2", "v1")} for _ in range(3)]
    v2, v1 = (open_archive(Data(path=str(folder / name))).split("train") for name in ("v2", "v1"))
    preprocess = Preprocess(Data(), 120)
    pair = sum(tensor[0].nbytes for tensor in v2.read([0]))
    values, memory = list(np.ones((1024, pair), np.uint8)), np.zeros((NATIVE_BATCH, pair), np.uint8)
    passes: dict[str, Callable[[], int]] = {
        "native_v2": partial(native, v2),
        "native_v1": partial(native, v1),
        "full_v2": partial(full, v2, preprocess),
        "full_v1": partial(full, v1, preprocess),
        "conventional_v2": partial(conventional, v2, read_v2, 256),
        "conventional_v1": partial(conventional, v1, read_v1, 256),
        "copy_bound": partial(copied, values, memory),
    }
    with patch_interface("pydantic 2"):
        rounds = [{name: steady_rate(run_pass) for name, run_pass in passes.items()} for _ in range(PASSES)]
    return {
        name: round(statistics.median(figures[name] for figures in measured), 1)
        for measured in (rounds, colds)
        for name in measured[0]
    }


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2048, help="pairs of each archive")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="only read this archive")
    parser.add_argument("--epochs", type=int, default=1, help="how often to read it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments.read:
        print(json.dumps(read(arguments.read, arguments.epochs)))
        return
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        figures = {"pairs": arguments.pairs} | measure(Path(folder), arguments.pairs)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
