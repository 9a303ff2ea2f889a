"""The tables that are printed after a search, and the list of studies."""

import io
from pathlib import Path

import pytest
from optuna.storages import RDBStorage
from rich.console import Console

from csmae.cli.main import main
from csmae.console.tables import format_best_trials, format_scores, format_studies
from csmae.storage.layout import DATABASE
from csmae.study.study import load_study
from csmae.trials import database
from csmae.trials.store import TrialStore
from tests.console.test_terminal import MARKUP
from tests.study.test_study import write
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


def trained_study(folder: Path, name: str) -> None:
    objectives = {"val/recall_at_1": "maximize"}
    study = load_study(write(folder, {"masking.ratio": {"float": [0.3, 0.9]}}, objectives=objectives), name)
    searcher, _ = make_searcher(study, folder)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"epoch": 4, "metrics/val/recall_at_1": 0.61234, "finished": True})


@pytest.mark.parametrize("name", ["architecture-v2-64", "architecture-with-a-name-" * 4])
def test_the_list_of_studies_shortens_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    trained_study(tmp_path, name)
    assert main(["search", "--list", "--storage", str(tmp_path)]) == 0
    *_, header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["study", "done", "pruned", "failed", "running", "best", "of"]
    assert row.split() == [name, "1", *3 * ["0"], "0.6123", "val/recall_at_1"]
    assert len(row.rstrip()) <= 80 or len(name) > 22


def test_the_list_of_studies_opens_the_database_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        trained_study(tmp_path, name)
    opened: list[Path] = []
    open_storage = database.open_storage

    def spy(path: Path) -> RDBStorage:
        opened.append(path)
        return open_storage(path)

    monkeypatch.setattr(database, "open_storage", spy)
    assert format_studies(tmp_path / DATABASE).row_count == 2
    assert opened == [tmp_path / DATABASE]
