"""Runs in files, their summary, and the rival that our own environment can run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from curves.clock import Run, Simulation
from curves.records import Case, cases, read_runs, run_cases
from curves.summary import RANDOM, Family, as_markdown
from curves.tables import Table
from rivals.run import make_method

from tests.benchmarks.test_curves import make_table

WANTED = cases(["one", "two"], ["made-1"], 2, 1)


def simulate(case: Case) -> Run:
    """The method "one" finds the best configuration of ``make_table()``; "two" finds nothing."""
    return Run(improvements=[(10 + case.seed, 0)] if case.method == "one" else [], num_decisions=4, decision_s=0.5)


def test_all_methods_have_a_seed_before_the_next_one_begins() -> None:
    assert [(case.seed, case.method) for case in WANTED] == [(0, "one"), (0, "two"), (1, "one"), (1, "two")]


def test_an_interrupted_measurement_continues_where_it_stopped(tmp_path: Path) -> None:
    path, simulated = tmp_path / "new" / "runs.jsonl", list[Case]()

    def note(case: Case) -> Run:
        simulated.append(case)
        return simulate(case)

    first = dict(run_cases(WANTED[:3], note, path, 1))
    everything = dict(run_cases(WANTED, note, path, 1))
    assert simulated == WANTED
    assert everything == {case: simulate(case) for case in WANTED} == read_runs(path)
    assert first.keys() < everything.keys()


def test_runs_in_several_processes_are_the_same(tmp_path: Path) -> None:
    assert dict(run_cases(WANTED, simulate, None, 2)) == {case: simulate(case) for case in WANTED}


def test_the_summary_has_every_method_and_random_search(tmp_path: Path) -> None:
    family = Family([make_table()], 1)
    figures = family.summarize({case: simulate(case) for case in WANTED})
    assert next(iter(figures)) == "one" and set(figures) == {"one", "two", RANDOM}
    assert figures[RANDOM].speed_up.value == 1 and figures[RANDOM].seeds == 1000
    one, two = figures["one"].as_json(), figures["two"].as_json()
    assert one["reached"] == 1 and one["ms"] == 125 and one["seeds"] == 2
    assert two["reached"] == 0 and two["regret"] == {"3": 1, "10": 1, "30": 1} and two["speed_up"] < 1
    assert json.loads(json.dumps(one)) == one
    lines = as_markdown("made", 1, figures).splitlines()
    assert len(lines) == 5 and lines[2].startswith("| one | ") and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("method", ["optuna tpe", "optuna tpe+hyperband"])
def test_optuna_alone_searches_a_table(method: str) -> None:
    table = make_table(num_diverged=100)
    run = Simulation(table, make_method(Case(method, table.name, 0, 2), table), workers=2).run()
    assert run.num_finished > 10 and run.improvements[-1][1] < 20
    assert (run.num_finished < run.num_trials / 3) == ("hyperband" in method)


def test_a_rival_is_the_same_with_the_same_seed() -> None:
    table: Table = make_table()
    case = Case("optuna tpe+hyperband", table.name, 3, 1)
    runs = [Simulation(table, make_method(case, table)).run().improvements for _ in range(2)]
    assert runs[0] == runs[1]
