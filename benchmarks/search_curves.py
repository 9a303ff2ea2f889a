"""Our search and its rivals on public learning curves of real trainings, under a simulated clock.

Measured are the speed-up over random search until a configuration of the best 1 % is fully trained (both censored at the budget
of 30 complete trainings; the geometric mean over the tables, with 95 % bootstrap intervals over seeds and tables), the regret at
3, 10 and 30 complete trainings, and the time per decision. Our methods are the real searcher, trial store, samplers and strategy;
rivals' runs come from ``make rivals``. Prints a table for each family of tables and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from curves.baselines import BestOfFirstEpoch
from curves.clock import Run, Simulation
from curves.ours import Ours, parse_settings
from curves.records import Case, Runs, cases, read_runs, run_cases
from curves.summary import Family, Figures, as_markdown
from curves.tables import FOLDER, Table, curves_dir, read_tables

BEST_OF_FIRST_EPOCH = "best 3 of 100 after an epoch"

OURS = ("auto", "tpe+asha", BEST_OF_FIRST_EPOCH)
"""Methods that are measured by default."""

RIVALS = Path(__file__).parent / "rivals" / "runs.jsonl"
"""Runs of ``make rivals``."""


@dataclass(frozen=True)
class Searches:
    """Runs our methods on the tables of a folder."""

    folder: Path

    def __call__(self, case: Case) -> Run:
        """Run one case, with its trial store in memory."""
        table = _read_table(self.folder, case.task)
        if case.method == BEST_OF_FIRST_EPOCH:
            return Simulation(table, BestOfFirstEpoch(table, case.seed), case.workers).run()
        with tempfile.TemporaryDirectory() as folder:
            method = Ours(table, parse_settings(case.method), case.seed, case.workers, Path(folder))
            return Simulation(table, method, case.workers).run()


def make_settings(method: str) -> dict[str, Any]:
    """Settings of one of our methods.

    Raises:
        ValueError: There is no such method; one line.
    """
    return {} if method == BEST_OF_FIRST_EPOCH else parse_settings(method)


@cache
def _read_table(folder: Path, name: str) -> Table:
    return read_tables(folder, [name])[0]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--curves", type=Path, help="folder of tables; default CSMAE_CURVES, else ../shared/curves")
    parser.add_argument("--tasks", nargs="*", default=[], help="tables or families; all by default")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(OURS), help="auto, or SAMPLER+STRATEGY,setting=value,…")
    parser.add_argument("--rivals", type=Path, nargs="*", default=[RIVALS], help="files of rivals' runs")
    parser.add_argument("--runs", type=Path, help="file that keeps our runs: the same command continues with it")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="picture of regret against budget")
    return parser.parse_args()


def is_named(folder: Path | None) -> bool:
    """Whether the user named a folder of tables; the default one is optional, and `make bench` continues without it."""
    return folder is not None or FOLDER in os.environ


def rival_runs(paths: list[Path], tables: list[Table], workers: int) -> Runs:
    """The rivals' runs on the same tables with as many workers."""
    names = {table.name for table in tables}
    runs = {case: run for path in paths for case, run in read_runs(path).items()}
    return {case: run for case, run in runs.items() if case.task in names and case.workers == workers}


def as_json(figures: Mapping[str, Figures], rivals: set[str]) -> dict[str, Any]:
    """The figures of a family, with the rivals apart."""
    values = {method: found.as_json() for method, found in figures.items()}
    result: dict[str, Any] = {method: value for method, value in values.items() if method not in rivals}
    result["rivals"] = {method: value for method, value in values.items() if method in rivals}
    if "auto" in figures and result["rivals"]:
        best = max(figures[rival].speed_up.value for rival in result["rivals"])
        result["auto_over_best_rival"] = round(figures["auto"].speed_up.value / best, 2)
    return result


def main() -> None:
    """Run what is missing and print the figures."""
    options = parse_arguments()
    try:
        folder = curves_dir(options.curves)
        tables = read_tables(folder, options.tasks)
        for method in options.methods:
            make_settings(method)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(is_named(options.curves) or isinstance(error, ValueError))
    wanted = cases(options.methods, [table.name for table in tables], options.seeds, options.workers)
    runs: Runs = {}
    for case, run in run_cases(wanted, Searches(folder), options.runs, options.processes):
        runs[case] = run
        print(f"{len(runs)}/{len(wanted)} {case.method}, {case.task}, seed {case.seed}", file=sys.stderr)
    rivals = rival_runs(options.rivals, tables, options.workers)
    families = [Family(list(group), options.workers) for _, group in groupby(tables, lambda table: table.family)]
    values = {}
    for family in families:
        figures = family.summarize(runs | rivals)
        print(as_markdown(family.name, options.workers, figures) + "\n", file=sys.stderr)
        values[family.name] = as_json(figures, {case.method for case in rivals})
    if options.plot:
        from curves.plot import plot_regret

        plot_regret(families, runs | rivals, options.plot)
    print(json.dumps(values))


if __name__ == "__main__":
    main()
