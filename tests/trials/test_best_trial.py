"""The terminal, the report, its pictures and Optuna name the best trial by one rule: constraints, seeds and budgets count."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from rich.console import Console

from csmae.__main__ import main
from csmae.console.tables import format_best_trials
from csmae.reporting.record import read_record
from csmae.reporting.report import write_report
from csmae.reporting.study_plots import history_picture, pareto_picture, study_pictures
from csmae.storage.layout import DATABASE
from csmae.study.study import Study
from csmae.tracking.outbox import OUTBOX, Outbox
from csmae.tracking.outbox import Event as Line
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard, stored_leaderboard
from csmae.trials.store import TrialStore
from csmae.tuning.champion import encoders_to_score
from csmae.tuning.events import EpochReported, Event, TrialEnded, TrialStarted
from csmae.tuning.searcher import StudySearcher
from tests.tuning.test_searcher import make_study

Trained = list[dict[str, float]]


def searched(study: Study, folder: Path, trained: Trained, cut: bool = False) -> TrialStore:
    """A study whose trials end with these metrics, one after the other, and the outbox that tells of them."""
    trial_store = TrialStore(study, folder)
    outbox = Outbox(trial_store.folder / OUTBOX)

    def listen(event: Event) -> None:
        match event:
            case TrialStarted():
                line = Line("trial", event.number, 1_000, {"params": dict(event.values)})
            case EpochReported():
                line = Line("epoch", event.number, 2_000, {"epoch": event.epoch, "metrics": dict(event.metrics)})
            case TrialEnded():
                ended: dict[str, Any] = {"state": event.state, "reason": event.reason, "step": 4, "metrics": {}}
                line = Line("end", event.number, 3_000, ended)
        outbox.append(line)

    objective, direction = next(iter(study.search.objectives.items()))
    start = {"params": {}, "tags": {}, "primary_metric": objective, "direction": direction}
    outbox.append(Line("start", None, 0, start))
    searcher = StudySearcher(Budget(trial_store), listen)
    for index, metrics in enumerate(trained):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        (Path(suggestion["run_dir"]) / "encoder").mkdir(parents=True)
        result = {"epoch": 4, **{f"metrics/{name}": value for name, value in metrics.items()}}
        if cut:
            searcher.on_trial_result(str(index), result)
        else:
            searcher.on_trial_complete(str(index), {**result, "finished": True})
    if cut:
        searcher.cut_short_trials("the time limit of 1s is reached")
    outbox.close()
    return trial_store


@pytest.fixture
def trial_store(tmp_path: Path) -> TrialStore:
    """Trial 2 scores best and breaks a constraint, trial 1 is disproved by its repetition, trial 0 is the champion."""
    settings: dict[str, Any] = {"sampler": "random", "scheduler": "none", "start_from": []}
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
    rows = re.findall(r"^\| (\d) \| trained to the end \| ([^|]+) \| ([^|]*) \|", text, re.M)
    assert [number for number, *_ in rows] == ["0", "1", "2", "3", "4"]
    assert [note.strip() for *_, note in rows] == ["", "", "breaks time/epoch_s", "repeats trial 1", "repeats trial 0"]
    assert re.findall(r"<tr class=best><td>(\d)</td>", page) == ["0"]


def test_the_pictures_are_those_of_trials_that_can_win(trial_store: TrialStore) -> None:
    write_report(trial_store.folder, leaderboard(trial_store.optuna_study))
    drawn = {path.parts[-3] for path in trial_store.folder.glob("trials/*/pictures/losses.png")}
    assert drawn == {"0", "1"}
    axes = history_picture(read_record(trial_store.folder, leaderboard(trial_store.optuna_study))).axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    ring = lines["best: trial 0, mean of 2 seeds"]
    assert (list(np.asarray(ring.get_xdata())), list(np.asarray(ring.get_ydata()))) == ([0], [pytest.approx(0.525)])
    assert max(np.asarray(lines["best so far"].get_ydata())) == 0.6
    texts = {str(points.get_label()) for points in axes.collections}
    assert texts == {"trained to the end", "repetition with another seed", "breaks a constraint"}


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


def test_trials_that_a_budget_cut_are_ranked_in_the_report_where_none_came_to_its_end(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=2, sampler="random", start_from=[])
    trial_store = searched(study, tmp_path, [{"val/f1_mean": 0.3}, {"val/f1_mean": 0.4}], cut=True)
    write_report(trial_store.folder, stored_leaderboard(trial_store.folder))
    assert "The best is trial 1: val/f1_mean 0.4." in (trial_store.folder / "report.md").read_text()
    assert (trial_store.folder / "trials" / "1" / "pictures" / "losses.png").exists()


GOALS = {"val/f1_mean": "maximize", "cost/flops": "minimize", "cost/params": "minimize"}


@pytest.mark.parametrize("num_goals", [2, 3])
def test_the_pareto_picture_shows_the_objectives_of_the_study(tmp_path: Path, num_goals: int) -> None:
    goals = dict(list(GOALS.items())[:num_goals])
    study = make_study(tmp_path, num_trials=4, objectives=goals, sampler="random", scheduler="none", start_from=[])
    points = ((0.5, 5.0, 5.0), (0.6, 6.0, 6.0), (0.4, 7.0, 7.0), (0.3, 1.0, 1.0))
    trial_store = searched(study, tmp_path, [dict(zip(GOALS, point, strict=True)) for point in points])
    record = read_record(trial_store.folder, stored_leaderboard(trial_store.folder))
    figure = pareto_picture(record)
    assert figure.get_suptitle() == f"study: Pareto front of {', '.join(goals)}"
    assert [axes.get_xlabel() for axes in figure.axes] == [f"{name} (minimize)" for name in list(goals)[1:]]
    assert figure.axes[0].get_ylabel() == "val/f1_mean (maximize)"
    for axes in figure.axes:
        (line,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
        assert list(np.asarray(line.get_xdata())) == [1.0, 5.0, 6.0]
        assert list(np.asarray(line.get_ydata())) == [0.3, 0.5, 0.6]
    assert "pareto" in dict(study_pictures(record))
    assert "| 1 | trained to the end | 0.6 | 6 |" in _report(trial_store)


def _report(trial_store: TrialStore) -> str:
    return write_report(trial_store.folder, stored_leaderboard(trial_store.folder))[1].read_text()


def test_a_study_of_one_objective_has_no_pareto_front(trial_store: TrialStore) -> None:
    names = dict(study_pictures(read_record(trial_store.folder, stored_leaderboard(trial_store.folder))))
    assert "pareto" not in names
    assert names["time"].get_suptitle() == "study: objective against training time"
    assert "Pareto" not in _report(trial_store)
