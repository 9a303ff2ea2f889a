"""Runs in files of JSON lines, so that a long measurement continues where it stopped and rivals' runs are merged."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from curves.clock import Run


@dataclass(frozen=True)
class Case:
    """What a run is a run of."""

    method: str
    task: str
    seed: int
    workers: int


Runs = dict[Case, Run]


def read_runs(path: Path) -> Runs:
    """Read the runs of a file; none if it does not exist."""
    return dict(map(_parse, path.read_text(encoding="utf-8").splitlines())) if path.exists() else {}


def _parse(line: str) -> tuple[Case, Run]:
    values = json.loads(line)
    case = Case(**{field.name: values.pop(field.name) for field in fields(Case)})
    values["improvements"] = [(spent, rank) for spent, rank in values["improvements"]]
    return case, Run(**values)


def cases(methods: Iterable[str], tasks: Sequence[str], seeds: int, workers: int) -> list[Case]:
    """All cases: each seed with all tasks and methods before the next seed."""
    names = list(methods)
    return [Case(method, task, seed, workers) for seed in range(seeds) for task in tasks for method in names]


def run_cases(
    wanted: Sequence[Case], simulate: Callable[[Case], Run], path: Path | None, processes: int
) -> Iterator[tuple[Case, Run]]:
    """Run the cases that a file does not have, add them to it, and yield all of them.

    Args:
        wanted: The cases.
        simulate: Runs one of them, in a process of its own unless there is only one process.
        path: File of JSON lines; None keeps nothing.
        processes: Runs at a time.
    """
    known = read_runs(path) if path else {}
    yield from ((case, known[case]) for case in wanted if case in known)
    missing = [case for case in wanted if case not in known]
    for case, run in _run(missing, simulate, processes):
        if path:
            _append(path, case, run)
        yield case, run


def _run(missing: Sequence[Case], simulate: Callable[[Case], Run], processes: int) -> Iterator[tuple[Case, Run]]:
    if processes == 1 or len(missing) < 2:
        yield from ((case, simulate(case)) for case in missing)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(simulate, case): case for case in missing}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


def _append(path: Path, case: Case, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = asdict(case) | asdict(run)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, separators=(",", ":")) + "\n")
