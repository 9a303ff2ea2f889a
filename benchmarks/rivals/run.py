"""Runs rivals on tables of learning curves: ``PYTHONPATH=benchmarks python -m rivals.run FILE`` in a rival's environment.

Adds each run to the file as a JSON line, so that an interrupted measurement continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from curves.clock import Method, Run, Simulation
from curves.records import Case, cases, run_cases
from curves.tables import Table, curves_dir, read_tables

CLASSES = {"syne-tune": "SyneTune", "neps": "Neps", "optuna": "Optuna"}
"""By the first word of a method's name; the module is called after it."""


@dataclass(frozen=True)
class Rivals:
    """Runs rivals on the tables of a folder."""

    folder: Path

    def __call__(self, case: Case) -> Run:
        """Run one case."""
        table = _read_table(self.folder, case.task)
        return Simulation(table, make_method(case, table), case.workers).run()


@cache
def _read_table(folder: Path, name: str) -> Table:
    return read_tables(folder, [name])[0]


def make_method(case: Case, table: Table) -> Method:
    """Make a rival for one run; its project must be installed."""
    project = case.method.partition(" ")[0]
    module = importlib.import_module(f"rivals.{project.replace('-', '_')}_methods")
    method: Method = getattr(module, CLASSES[project])(case.method, table, case.seed, case.workers)
    return method


def main() -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSON lines of earlier runs, to which new ones are added")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--curves", type=Path)
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    folder = curves_dir(options.curves)
    names = [table.name for table in read_tables(folder, options.tasks)]
    wanted = cases(options.methods, names, options.seeds, options.workers)
    for case, run in run_cases(wanted, Rivals(folder), options.file, options.processes):
        print(case, run.decision_s, flush=True)


if __name__ == "__main__":
    main()
