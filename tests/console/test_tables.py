"""The tables that are printed after a search, and the list of studies."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from csmae.console.tables import format_best_trials, format_scores, format_studies
from csmae.storage.layout import DATABASE
from csmae.trials.store import TrialStore
from tests.console.test_terminal import MARKUP
from tests.tuning.test_cut_short_trials import cut_before_first_score
from tests.tuning.test_searcher import make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")


def test_the_best_trials_fit_eighty_columns(tmp_path: Path) -> None:
    wide = {
        name: {"float": [0.1, 0.9]} for name in ("masking.ratio", "loss.mim_weight", "loss.temperature", "optim.lr")
    }
    study = make_study(tmp_path, wide, sampler="random", num_trials=3)
    searcher, _ = make_searcher(study, tmp_path)
    for index in range(3):
        searcher.suggest(str(index))
        searcher.on_trial_complete(str(index), result(4, index / 10, finished=True))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(format_best_trials(TrialStore(study, tmp_path)))
    _, header, best, *_ = console.export_text().splitlines()
    assert header.split() == ["trial", "val/f1_mean", "settings"]
    assert best.split()[:2] == ["2", "0.2"] and best.split()[2].startswith("masking.ratio=0.")


def test_tables_print_markup_literally(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    output = io.StringIO()
    folder = tmp_path / "[bold]runs"
    folder.mkdir()
    (tmp_path / "studies.db").rename(folder / "studies.db")
    console = Console(file=output, width=300)
    console.print(format_studies(folder / "studies.db"))
    console.print(format_best_trials(TrialStore(study, folder)))
    console.print(format_scores({MARKUP: {"test/recall_at_1": 0.5, "test/mrr": 0.5}}))
    shown = "".join(output.getvalue().split())
    assert f"studiesin{folder}/studies.db" in shown and "".join(MARKUP.split()) in shown


def test_the_list_of_studies_counts_waiting_trials(tmp_path: Path) -> None:
    cut_before_first_score(tmp_path)
    table = format_studies(tmp_path / DATABASE)
    row = {str(column.header): list(map(str, column.cells)) for column in table.columns}
    assert row["waiting"] == ["1"] and row["running"] == ["0"]
