"""Exact search by blocks against a loop over the queries and against faiss's flat index, float32, 768-d, on this CPU.

Sizes: BEN-14K's (3,500 queries, 3,500 scenes), and 20,000 queries in an archive of 120,000 (BigEarthNet's test split).
All three find the ten nearest by cosine similarity among L2-normalised features, with as many threads as there are
cores. The loop takes one query at a time: ``archive @ query``, then numpy's ``argsort``; its time is that of a sample of
queries, extrapolated. All take turns; ratios are medians over the rounds. Features are random around 50 centres, as an encoder's are
around its classes.

Prints one JSON line. ``loop_ratio`` and ``faiss_ratio`` are theirs over ours at the large size (more is better for us);
``sizes`` has them for both, with ``partition_ratio``, the loop with ``argpartition`` in place of ``argsort``, the seconds,
the share of the hits that are faiss's (ties apart it is 1), and ``extra_mb``, what the search took in memory beyond the features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from csmae.retrieval.nearest import ARCHIVE_BLOCK, search

WIDTH, K, CENTRES = 768, 10, 50

Floats = NDArray[np.float32]


def features(count: int, seed: int) -> Floats:
    """L2-normalised features (count, WIDTH) around the centres."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CENTRES, WIDTH), np.float32)
    found = random.standard_normal((count, WIDTH), np.float32) + centres[random.integers(CENTRES, size=count)]
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it gives. First the threads of what ran before go to sleep: they spin for a while."""
    time.sleep(0.3)
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def memory_mb(name: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def extra_memory_mb(run: Callable[[], Any]) -> float:
    """What a call adds to the process's memory at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_mb("VmRSS")
    run()
    return memory_mb("VmHWM") - before


def loop(queries: Floats, archive: Floats, pick: Callable[[Floats], NDArray[np.intp]]) -> list[NDArray[np.intp]]:
    """One query after the other."""
    return [pick(archive @ query) for query in queries]


def by_sorting(similarity: Floats) -> NDArray[np.intp]:
    """The K largest, best first."""
    return np.argsort(-similarity)[:K]


def by_partition(similarity: Floats) -> NDArray[np.intp]:
    """The K largest, best first."""
    largest = np.argpartition(-similarity, K)[:K]
    return largest[np.argsort(-similarity[largest])]


def compare(num_queries: int, num_archive: int, rounds: int, sample: int) -> dict[str, Any]:
    """All ways at one size."""
    queries, archive = features(num_queries, 1), features(num_archive, 2)
    index = faiss.IndexFlatIP(WIDTH)
    index.add(archive)
    queries_qd, archive_nd = torch.from_numpy(queries), torch.from_numpy(archive)

    def ours() -> Any:
        return search(queries_qd, archive_nd.split(ARCHIVE_BLOCK), K).indices_qk.numpy()

    def theirs() -> Any:
        return index.search(queries, K)[1]

    extra_mb = extra_memory_mb(ours)  # of the first search, before the allocator keeps what an earlier one has freed
    same = float((ours() == theirs()).mean())
    chosen = queries[:: num_queries // sample][:sample]
    ways: dict[str, Callable[[], Any]] = {"ours": ours, "faiss": theirs}
    ways |= {pick.__name__: lambda pick=pick: loop(chosen, archive, pick) for pick in (by_sorting, by_partition)}  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            times[name].append(seconds(run)[0])
    own, whole = statistics.median(times["ours"]), num_queries / len(chosen)
    ratios = {
        name: statistics.median(other / mine for other, mine in zip(taken, times["ours"], strict=True))
        for name, taken in times.items()
    }
    return {
        "loop_ratio": round(whole * ratios["by_sorting"], 1),
        "partition_ratio": round(whole * ratios["by_partition"], 1),
        "faiss_ratio": round(ratios["faiss"], 3),
        "faiss_ratios": [round(f / o, 3) for o, f in zip(times["ours"], times["faiss"], strict=True)],
        "seconds": round(own, 3),
        "same_hits": same,
        "extra_mb": round(extra_mb),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="at the large size; three times as many at the small")
    parser.add_argument("--sample", type=int, default=50, help="queries of the loop, in each round")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    faiss.omp_set_num_threads(cores)
    sizes = {
        "3500x3500": compare(3500, 3500, 3 * options.rounds, options.sample),
        "20000x120000": compare(20_000, 120_000, options.rounds, options.sample),
    }
    large = sizes["20000x120000"]
    result = {"loop_ratio": large["loop_ratio"], "faiss_ratio": large["faiss_ratio"]}
    print(json.dumps(result | {"cores": cores, "sizes": sizes}))
