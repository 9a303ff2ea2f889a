"""Exact block-wise search compared with a loop over the queries and with faiss's flat index, float32, 768-d, on this CPU.

Sizes: BEN-14K's (3,500 queries, 3,500 scenes), and 20,000 queries in an archive of 120,000 (BigEarthNet's test split). All
methods find the ten nearest neighbors by cosine similarity among L2-normalized features, with one thread per core. The loop
takes one query at a time: ``archive @ query``, then numpy's ``argsort``; its time is extrapolated from a sample of queries.
All methods take turns; ratios are medians over the rounds. Features are random around 50 centers, like an encoder's around its
classes.

Prints one JSON line. ``loop_ratio``, ``faiss_ratio`` and ``float32_ratio`` are the times of the others over ours at the large
size; ``float32`` is our search without quantized bounds. ``sizes`` has the ratios of both sizes, with ``partition_ratio`` (the
loop with ``argpartition`` instead of ``argsort``), the seconds, the fraction of the hits that equal faiss's (1 except for ties),
and ``extra_mb``, the memory that the search takes beyond the features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from csmae.retrieval import quantized
from csmae.retrieval.nearest import ARCHIVE_BLOCK, search

WIDTH, K, CENTERS = 768, 10, 50

Floats = NDArray[np.float32]


def features(count: int, seed: int) -> Floats:
    """L2-normalized features (count, WIDTH) around the centers."""
    random = np.random.default_rng(seed)
    centers = np.random.default_rng(0).standard_normal((CENTERS, WIDTH), np.float32)
    points = random.standard_normal((count, WIDTH), np.float32) + centers[random.integers(CENTERS, size=count)]
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True), np.float32)


@contextmanager
def without_bounds() -> Iterator[None]:
    """Search without quantized bounds."""
    fast_dtypes = quantized.fast_dtypes
    quantized.fast_dtypes = lambda: ()  # type: ignore[assignment]
    try:
        yield
    finally:
        quantized.fast_dtypes = fast_dtypes


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time and result of a call."""
    time.sleep(0.3)  # threads of the previous method busy-wait for a while
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def memory_mb(name: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def extra_memory_mb(run: Callable[[], Any]) -> float:
    """Memory that a call adds to the process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = memory_mb("VmRSS")
    run()
    return memory_mb("VmHWM") - before


def loop(queries: Floats, archive: Floats, pick: Callable[[Floats], NDArray[np.intp]]) -> list[NDArray[np.intp]]:
    """Search one query after the other."""
    return [pick(archive @ query) for query in queries]


def by_sorting(similarity: Floats) -> NDArray[np.intp]:
    """The K largest, best first."""
    return np.argsort(-similarity)[:K]


def by_partition(similarity: Floats) -> NDArray[np.intp]:
    """The K largest, best first."""
    largest = np.argpartition(-similarity, K)[:K]
    return largest[np.argsort(-similarity[largest])]


def compare(num_queries: int, num_archive: int, rounds: int, sample_size: int) -> dict[str, Any]:
    """Compare all methods at one size."""
    queries, archive = features(num_queries, 1), features(num_archive, 2)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(archive)
    queries_qd, archive_nd = torch.from_numpy(queries), torch.from_numpy(archive)

    def ours() -> Any:
        return search(queries_qd, archive_nd.split(ARCHIVE_BLOCK), K).indices_qk.numpy()

    def float32() -> Any:
        with without_bounds():
            return ours()

    def faiss_search() -> Any:
        return index.search(queries, K)[1]

    extra_mb = extra_memory_mb(ours)  # first: later searches reuse memory that this one has freed
    same = float((ours() == faiss_search()).mean())
    sample = queries[:: num_queries // sample_size][:sample_size]
    methods: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "float32": float32,
        "faiss": faiss_search,
        "loop": lambda: loop(sample, archive, by_sorting),
        "partition": lambda: loop(sample, archive, by_partition),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            times[name].append(seconds(method)[0])
    ratios = {name: [other / own for other, own in zip(times[name], times["ours"], strict=True)] for name in methods}
    median = {name: statistics.median(values) for name, values in ratios.items()}
    extrapolation = num_queries / len(sample)
    return {
        "loop_ratio": round(extrapolation * median["loop"], 1),
        "partition_ratio": round(extrapolation * median["partition"], 1),
        "faiss_ratio": round(median["faiss"], 3),
        "faiss_ratios": [round(ratio, 3) for ratio in ratios["faiss"]],
        "float32_ratio": round(median["float32"], 3),
        "float32_ratios": [round(ratio, 3) for ratio in ratios["float32"]],
        "seconds": round(statistics.median(times["ours"]), 3),
        "same_hits": same,
        "extra_mb": round(extra_mb),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=3, help="at the large size; three times as many at the small size"
    )
    parser.add_argument("--sample", type=int, default=50, help="queries of the loop in each round")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    faiss.omp_set_num_threads(cores)
    sizes = {
        "3500x3500": compare(3500, 3500, 3 * options.rounds, options.sample),
        "20000x120000": compare(20_000, 120_000, options.rounds, options.sample),
    }
    large = sizes["20000x120000"]
    result = {name: large[name] for name in ("loop_ratio", "faiss_ratio", "float32_ratio")}
    print(json.dumps(result | {"cores": cores, "sizes": sizes}))
