"""The terminal, the report, its plots and Optuna name the best trial by one rule: constraints, seeds and budgets count."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

from csmae.cli.main import main
from csmae.console.tables import format_best_trials
from csmae.reporting.report import Report, study_figures, write_report
from csmae.reporting.study_plots import history_figure, pareto_figure
from csmae.storage.layout import DATABASE
from csmae.study.study import Study
from csmae.training.history import append_metrics
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.tuning.champion import encoders_to_score
from csmae.tuning.searcher import StudySearcher
from tests.tuning.test_searcher import make_study

Trained = list[dict[str, float]]


def searched(study: Study, folder: Path, trained: Trained, cut: bool = False) -> TrialStore:
    """A study whose trials end with these metrics, one after the other."""
    trial_store = TrialStore(study, folder)
    searcher = StudySearcher(Budget(trial_store), lambda event: None, lambda: 99)
    for index, metrics in enumerate(trained):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        (Path(suggestion["run_dir"]) / "encoder").mkdir(parents=True)
        append_metrics(Path(suggestion["run_dir"]), 4, metrics)
        result = {"epoch": 4, **{f"metrics/{name}": value for name, value in metrics.items()}}
        if cut:
            searcher.on_trial_result(str(index), result)
        else:
            searcher.on_trial_complete(str(index), {**result, "finished": True})
    if cut:
        searcher.cut_short_trials("the time limit of 1s is reached")
    return trial_store


def report_of(trial_store: TrialStore) -> Report:
    return Report(trial_store.optuna_study, trial_store.folder)


@pytest.fixture
def trial_store(tmp_path: Path) -> TrialStore:
    """Trial 2 scores best and violates a constraint, trial 1 is disproved by its confirmation, trial 0 is the champion."""
    settings: dict[str, Any] = {"sampler": "random", "strategy": "none", "start_from": []}
    study = make_study(
        tmp_path, num_trials=3, confirm={"top": 2, "seeds": 1}, constraints={"time/epoch_s": "<= 10"}, **settings
    )
    seconds, scores = (1, 1, 99, 1, 1), (0.5, 0.6, 0.9, 0.2, 0.55)
    trained = [{"val/f1_mean": score, "time/epoch_s": s} for score, s in zip(scores, seconds, strict=True)]
    return searched(study, tmp_path, trained)


def test_the_report_names_the_champion(trial_store: TrialStore) -> None:
    champion = encoders_to_score(trial_store)[-1].trial
    assert champion is not None
    assert champion.number == 0
    assert main(["report", "study", "--storage", str(trial_store.folder.parent)]) == 0
    text, page = (trial_store.folder / "report.md").read_text(), (trial_store.folder / "report.html").read_text()
    assert "The best is trial 0: val/f1_mean 0.525 ± 0.035 (2 seeds)." in text
    rows = re.findall(r"^\| (\d) \| completed \| ([^|]+) \| ([^|]*) \|", text, re.M)
    assert [number for number, *_ in rows] == ["0", "1", "2", "3", "4"]
    assert [note.strip() for *_, note in rows] == [
        "",
        "",
        "violates time/epoch_s",
        "confirms trial 1",
        "confirms trial 0",
    ]
    assert re.findall(r"<tr class=best><td>(\d)</td>", page) == ["0"]


def test_the_plots_are_those_of_trials_that_can_win(trial_store: TrialStore) -> None:
    write_report(report_of(trial_store))
    plotted = {path.parts[-3] for path in trial_store.folder.glob("trials/*/plots/losses.png")}
    assert plotted == {"0", "1"}
    axes = history_figure(leaderboard(trial_store.optuna_study)).axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    best = lines["best: trial 0, mean of 2 seeds"]
    assert (list(np.asarray(best.get_xdata())), list(np.asarray(best.get_ydata()))) == ([0], [pytest.approx(0.525)])
    assert max(np.asarray(lines["best so far"].get_ydata())) == 0.6
    texts = {str(points.get_label()) for points in axes.collections}
    assert texts == {"completed", "confirmation with another seed", "violates a constraint"}


def test_the_terminals_table_begins_with_the_champion(trial_store: TrialStore) -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(format_best_trials(trial_store))
    assert [line.split()[0] for line in console.export_text().splitlines()[2:]] == ["0", "1"]


def test_optunas_best_trial_keeps_to_the_constraints_and_the_study_names_the_champion(trial_store: TrialStore) -> None:
    best = leaderboard(trial_store.optuna_study).entries[0]
    trial_store.record_champion(best.trial.number, best.mean, best.num_seeds)
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{trial_store.path.parent}/{DATABASE}")
    assert study.best_trial.number == 1
    assert study.user_attrs["champion"] == {"trial": 0, "mean": pytest.approx(0.525), "seeds": 2}


def test_trials_that_a_budget_cut_short_are_ranked_in_the_report_if_none_completed(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=2, sampler="random", start_from=[])
    trial_store = searched(study, tmp_path, [{"val/f1_mean": 0.3}, {"val/f1_mean": 0.4}], cut=True)
    write_report(report_of(trial_store))
    assert "The best is trial 1: val/f1_mean 0.4." in (trial_store.folder / "report.md").read_text()
    assert (trial_store.folder / "trials" / "1" / "plots" / "losses.png").exists()


GOALS = {"val/f1_mean": "maximize", "cost/flops": "minimize", "cost/params": "minimize"}


@pytest.mark.parametrize("num_goals", [2, 3])
def test_the_pareto_plot_shows_the_objectives_of_the_study(tmp_path: Path, num_goals: int) -> None:
    goals = dict(list(GOALS.items())[:num_goals])
    study = make_study(tmp_path, num_trials=4, objectives=goals, sampler="random", strategy="none", start_from=[])
    points = ((0.5, 5.0, 5.0), (0.6, 6.0, 6.0), (0.4, 7.0, 7.0), (0.3, 1.0, 1.0))
    trial_store = searched(study, tmp_path, [dict(zip(GOALS, point, strict=True)) for point in points])
    board = leaderboard(trial_store.optuna_study)
    figure = pareto_figure(board)
    assert figure.get_suptitle() == f"study: Pareto front of {', '.join(goals)}"
    assert [axes.get_xlabel() for axes in figure.axes] == [f"{name} (minimize)" for name in list(goals)[1:]]
    assert figure.axes[0].get_ylabel() == "val/f1_mean (maximize)"
    for axes in figure.axes:
        (line,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
        assert list(np.asarray(line.get_xdata())) == [1.0, 5.0, 6.0]
        assert list(np.asarray(line.get_ydata())) == [0.3, 0.5, 0.6]
    assert "pareto" in dict(study_figures(board, {}))
    assert "| 1 | completed | 0.6 | 6 |" in report_of(trial_store).markdown()


def test_a_study_of_one_objective_has_no_pareto_front(trial_store: TrialStore) -> None:
    names = dict(study_figures(leaderboard(trial_store.optuna_study), {}))
    assert "pareto" not in names
    assert names["time"].get_suptitle() == "study: objective against training time"
    assert "Pareto" not in report_of(trial_store).markdown()


def test_epochs_without_scores_count_in_the_report(tmp_path: Path) -> None:
    trial_store = TrialStore(make_study(tmp_path, num_trials=2, sampler="random", start_from=[]), tmp_path)
    searcher = StudySearcher(Budget(trial_store), lambda event: None, lambda: 99)
    for name in "ab":
        searcher.suggest(name)
    searcher.on_trial_complete("a", {"epoch": 4, "metrics/val/f1_mean": 0.5, "finished": True})
    searcher.on_trial_result("b", {"epoch": 1, "metrics/train/loss": 1.0})
    searcher.on_trial_complete("b", {"failed": "the loss is not finite in epoch 2"})
    assert "2 trials (1 completed, 1 failed), 5 epochs in total." in report_of(trial_store).overview()
    assert ["num_epochs" in trial.user_attrs for trial in trial_store.all_trials()] == [False, True]
