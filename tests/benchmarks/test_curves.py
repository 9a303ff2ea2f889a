"""Tables of learning curves, the simulated clock and the measures, on small tables that the tests write."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from pathlib import Path

import numpy as np
import pytest
from curves.baselines import BestOfFirstEpoch, RandomSearch, random_runs
from curves.clock import BUDGET, Ending, Piece, Run, Simulation
from curves.measures import geometric_mean, reached, regret, speed_up, time_to_best
from curves.tables import Table, curves_dir, read_tables

EPOCHS = 4


def make_table(num: int = 300, num_diverged: int = 30, seed: int = 0) -> Table:
    """Losses that fall with the distance to a point; the first rows diverge in the second epoch."""
    random = np.random.default_rng(seed)
    points = np.stack([10 ** random.uniform(-5, -1, num), random.uniform(-3, 9, num)], axis=1)
    quality = (np.log10(points[:, 0]) + 3) ** 2 + (points[:, 1] / 4) ** 2
    losses = quality[:, None] + 1 / np.arange(1, EPOCHS + 1)
    losses[:num_diverged, 1:] = np.nan
    return Table("made-1", ("lr", "shift"), np.array([True, False]), points, losses)


class Script:
    """Trains what a list says, and notes what it is told."""

    def __init__(self, *pieces: Piece | None, stop_at: int = 99) -> None:
        self._pieces, self._stop_at = iter(pieces), stop_at
        self.reports: list[tuple[Hashable, int]] = []
        self.endings: list[tuple[Hashable, int, Ending]] = []

    def ask(self) -> Piece | None:
        return next(self._pieces, None)

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        self.reports.append((key, epoch))
        return epoch < self._stop_at

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        self.endings.append((key, epoch, ending))


def row_point(table: Table, row: int) -> dict[str, float]:
    return table.point(table.units[row])


@pytest.mark.parametrize("seed", range(5))
def test_a_point_is_trained_as_the_nearest_unused_configuration_in_the_unit_cube(seed: int) -> None:
    table, random = make_table(num_diverged=0), np.random.default_rng(seed)
    used = random.random(300) < 0.5
    unit = random.random(2)
    low, high = np.array(table.bounds).T

    def scaled(lr: float, shift: float) -> tuple[float, float]:
        return math.log(lr / low[0]) / math.log(high[0] / low[0]), (shift - low[1]) / (high[1] - low[1])

    distances = {i: math.dist(scaled(*table.points[i]), unit) for i in range(300) if not used[i]}
    assert table.nearest(table.point(unit), used) == min(distances, key=lambda row: distances[row])


def test_a_configuration_is_its_own_nearest_until_it_is_used() -> None:
    table, used = make_table(), np.zeros(300, dtype=bool)
    used[7] = True
    assert table.nearest(row_point(table, 6), used) == 6
    assert table.nearest(row_point(table, 7), used) != 7


def test_diverged_trainings_rank_last_and_take_the_epochs_until_they_diverge() -> None:
    table = make_table()
    assert sorted(table.ranks[:30]) == list(range(270, 300))
    assert set(table.lengths[:30]) == {2} and set(table.lengths[30:]) == {EPOCHS}
    assert table.regrets[0] == 0 and table.regrets[150] == 1 and table.regrets[-1] == 1


def test_a_paused_trial_continues_where_it_paused() -> None:
    table = make_table()
    method = Script(Piece("a", 2, row_point(table, 40)), Piece("b", 1, row_point(table, 41)), Piece("a", EPOCHS))
    run = Simulation(table, method).run()
    assert method.reports == [("a", 1), ("a", 2), ("b", 1), ("a", 3), ("a", 4)]
    assert method.endings == [("a", 2, Ending.PAUSED), ("b", 1, Ending.PAUSED), ("a", 4, Ending.FINISHED)]
    assert run.improvements == [(5, int(table.ranks[40]))]
    assert (run.num_trials, run.num_finished, run.num_decisions) == (2, 1, 3)


def test_a_method_stops_a_trial_and_a_diverged_one_ends_by_itself() -> None:
    table = make_table()
    method = Script(Piece("a", EPOCHS, row_point(table, 40)), stop_at=3)
    Simulation(table, method).run()
    assert method.endings == [("a", 3, Ending.STOPPED)]
    method = Script(Piece("a", EPOCHS, row_point(table, 0)))
    assert Simulation(table, method).run().num_finished == 0
    assert method.endings == [("a", 2, Ending.DIVERGED)]


def test_a_diverged_trial_cannot_be_resumed() -> None:
    table = make_table()
    with pytest.raises(AssertionError, match="cannot be resumed"):
        Simulation(table, Script(Piece("a", EPOCHS, row_point(table, 0)), Piece("a", EPOCHS))).run()


def test_the_budget_ends_a_search_in_the_middle_of_a_training() -> None:
    table = make_table()
    method = Script(*(Piece(row, EPOCHS, row_point(table, row)) for row in range(40, 50)))
    run = Simulation(table, method, budget=10).run()
    assert len(method.reports) == 10 and run.num_finished == 2 and run.num_trials == 3


def test_workers_train_side_by_side_and_an_idle_one_costs_as_much_as_a_busy_one() -> None:
    table = make_table()
    method = Script(Piece("a", EPOCHS, row_point(table, 40)), Piece("b", 1, row_point(table, 41)), None)
    run = Simulation(table, method, workers=2).run()
    assert method.reports == [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("a", 4)]
    assert run.improvements == [(8, int(table.ranks[40]))]


@pytest.mark.parametrize("workers", [1, 4])
def test_the_fast_random_searches_equal_simulated_ones(workers: int) -> None:
    table = make_table()
    seeds = np.random.SeedSequence(0).spawn(8)
    simulated = [Simulation(table, RandomSearch(table, seed), workers).run() for seed in seeds]
    assert [run.improvements for run in random_runs(table, workers, 8)] == [run.improvements for run in simulated]


def test_the_best_after_an_epoch_of_each_hundred_are_trained_to_their_end() -> None:
    table = make_table(num_diverged=0)
    run = Simulation(table, BestOfFirstEpoch(table, 0), budget=100 + 3 * (EPOCHS - 1)).run()
    assert (run.num_trials, run.num_finished) == (100, 3)
    assert run.improvements[0][1] < 10  # the best of a third of the table


def test_the_measures_of_a_run() -> None:
    table = make_table()  # of 300 configurations the best 3 count
    run = Run(improvements=[(8, 75), (16, 3), (40, 2)])
    assert time_to_best(table, run) == 40 and reached(table, run)
    assert [regret(table, run, budget) for budget in (1, 3, 10)] == [1, table.regrets[75], table.regrets[2]]
    missed = Run(improvements=[(8, 3)])
    assert time_to_best(table, missed) == BUDGET * EPOCHS and not reached(table, missed)


def test_the_speed_up_is_a_ratio_of_means_and_its_interval_covers_seeds_and_tables() -> None:
    random = np.random.default_rng(0)
    times = {name: list(random.uniform(50, 150, 20)) for name in ("a", "b", "c", "d")}
    reference = {"a": 200.0, "b": 200.0, "c": 200.0, "d": 800.0}
    found, seeds_only = speed_up(times, reference), speed_up(times, reference, tables=False)
    expected = geometric_mean([reference[name] / float(np.mean(times[name])) for name in times])
    assert found.value == pytest.approx(expected) == seeds_only.value
    assert found.low < seeds_only.low < expected < seeds_only.high < found.high


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for name in ("one-a", "one-b", "two-a"):
        table = make_table(num=20, num_diverged=2)
        names = np.array(table.names)
        np.savez(tmp_path / name, points=table.points, losses=table.losses, log=table.log, names=names)
    yield tmp_path


def test_tables_are_read_by_name_or_family(folder: Path) -> None:
    assert [table.name for table in read_tables(folder)] == ["one-a", "one-b", "two-a"]
    assert [table.name for table in read_tables(folder, ["one"])] == ["one-a", "one-b"]
    table = read_tables(folder, ["two-a"])[0]
    assert table.family == "two" and np.array_equal(table.losses, make_table(20, 2).losses, equal_nan=True)
    with pytest.raises(ValueError, match="no table and no family 'three'; there are one, one-a"):
        read_tables(folder, ["three"])


def test_a_folder_without_tables_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSMAE_CURVES", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"nothing: there are no tables .* --curves or CSMAE_CURVES"):
        curves_dir()
