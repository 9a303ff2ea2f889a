"""The report is written from the trial store: without an outbox, and the same as the search sees the study."""

from __future__ import annotations

import json
import math
import re
import subprocess
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from csmae.cli.main import main
from csmae.reporting.report import Report, write_report
from csmae.storage.layout import DATABASE, trial_dir
from csmae.training.history import append_metrics
from csmae.trials.attributes import CHAMPION, DEFINITION, FORMAT, PROVENANCE, REASON, SCORES, STUDY_FORMAT
from csmae.trials.database import open_storage
from tests.support.optuna_studies import add_trial, empty_study, study_of


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """A study as a search leaves it, in the storage folder ``tmp_path``."""
    study = empty_study(storage=open_storage(tmp_path / DATABASE))
    for value, attributes in ((0.3, {}), (0.6, {}), (math.nan, {REASON: "train/loss is nan"})):
        add_trial(study, value, {"masking.ratio": value if math.isfinite(value) else 0.7}, attributes=attributes)
    study.set_user_attr(FORMAT, STUDY_FORMAT)
    study.set_user_attr(DEFINITION, {"base": {"data": {"path": "<b>&"}}})
    study.set_user_attr(
        PROVENANCE, {"csmae.command": "python search.py spaces/masking.yaml", "csmae.git_commit": "abc123"}
    )
    study.set_user_attr(SCORES, {"champion": {"test/f1_mean": 0.61}, "untrained encoder": {"test/f1_mean": 0.25}})
    return study


@pytest.fixture
def report(study: optuna.Study, tmp_path: Path) -> Report:
    report = Report(study, tmp_path / "masking")
    report.importances = {"masking.ratio": 1.0}
    append_metrics(trial_dir(report.folder, 1), 1, {"train/loss": 1.0, "val/f1_mean": 0.6})
    return report


def test_the_report_is_one_page_that_needs_no_other_file(report: Report) -> None:
    page, summary, *plots = write_report(report)
    text = page.read_text()
    assert len(plots) == 6
    assert text.count("data:image/png;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    for part in (
        "3 trials (2 completed, 1 failed), 6 epochs in total.",
        "trial 1: val/f1_mean 0.6",
        "train/loss is nan",
        "python search.py spaces/masking.yaml",
        "git checkout abc123",
        "arXiv 2401.07782",
    ):
        assert part in text
        assert part in summary.read_text()


def test_the_summary_ranks_the_trials_and_shows_the_protocol_scores(report: Report) -> None:
    text = report.markdown()
    assert text.index("| 1 | completed | 0.6 |") < text.index("| 0 | completed | 0.3 |")
    assert "| champion | f1 | 0.61 | – |" in text
    assert "| masking.ratio | 100% |" in text


def test_the_report_command_names_the_files(
    study: optuna.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", study.study_name, "--storage", str(tmp_path)]) == 0
    folder = tmp_path / "masking"
    assert capsys.readouterr().out == f"{folder}/report.html and {folder}/report.md\n"


def test_the_report_command_creates_the_folder_of_a_study_without_trials(tmp_path: Path) -> None:
    study = empty_study(storage=open_storage(tmp_path / DATABASE))
    assert main(["report", study.study_name, "--storage", str(tmp_path)]) == 0
    assert (tmp_path / study.study_name / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(
    study: optuna.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / study.study_name).touch()
    assert main(["report", study.study_name, "--storage", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / study.study_name} cannot be written" in error and error.count("\n") == 1


def test_a_missing_study_is_reported_in_one_line_with_the_nearest_name(
    study: optuna.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "maskin", "--storage", str(tmp_path)]) == 2
    line = f"there is no study 'maskin' in {tmp_path / DATABASE}; did you mean 'masking'?\n"
    assert capsys.readouterr().err == line
    assert main(["report", "masking", "--storage", str(tmp_path / "elsewhere")]) == 2
    assert capsys.readouterr().err.startswith("there is no study 'masking' in ")


def test_a_study_of_another_version_is_reported_in_one_line(
    study: optuna.Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.set_user_attr(FORMAT, None)
    assert main(["report", "masking", "--storage", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "was created by" in error and error.count("\n") == 1


def test_time_and_hours_come_from_the_recorded_resources(tmp_path: Path) -> None:
    study = empty_study()
    add_trial(study, 0.3, {"masking.ratio": 0.5}, attributes={"gpu_s": 5400.0})
    add_trial(study, 0.4, {"masking.ratio": 0.6}, attributes={"gpu_s": 1800.0})
    text = Report(study, tmp_path).markdown()
    assert "2 trials (2 completed), 4 epochs, 2 GPU-hours in total." in text
    assert "| 0 | completed | 0.3 | 2 | 5400 s | 0.5 |" in text


def test_a_trial_that_waits_is_shown_with_its_reason(tmp_path: Path) -> None:
    study = study_of([0.3], masking__ratio=[0.5])
    waiting = optuna.create_trial(
        state=TrialState.WAITING, user_attrs={"interrupted": "the time limit of 1s is reached", "num_epochs": 1}
    )
    waiting.datetime_start = datetime(2026, 1, 1)
    study.add_trial(waiting)
    text = Report(study, tmp_path).markdown()
    assert "2 trials (1 completed, 1 waiting), 3 epochs in total." in text
    assert "| 1 | the time limit of 1s is reached |" in text
    assert "| 1 | waiting | – | 1 | 0 s | – |" in text


@pytest.mark.parametrize("name", ["it's", 'a "b"', "$HOME `x`", "back\\slash", "größe"])
def test_the_printed_command_loads_the_champion_in_any_folder(tmp_path: Path, name: str) -> None:
    study = study_of([0.5], masking__ratio=[0.5])
    study.set_user_attr(PROVENANCE, {"csmae.tracking": "Weights & Biases"})
    study.set_user_attr(CHAMPION, {"trial": 0, "mean": 0.5, "seeds": 1})
    line = Report(study, tmp_path / name / "masking").reproduction().splitlines()[-1]
    shell = line.replace("csmae.load_encoder", "print").replace("import csmae; ", "")
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / name / 'masking' / 'trials' / '0' / 'encoder'}\n"


def test_a_study_that_mlflow_tracks_loads_its_champion_by_the_alias(tmp_path: Path) -> None:
    study = study_of([0.5], masking__ratio=[0.5])
    study.set_user_attr(CHAMPION, {"trial": 0, "mean": 0.5, "seeds": 1})
    line = Report(study, tmp_path).reproduction().splitlines()[-1]
    assert json.dumps("models:/csmae-encoder@champion-masking") in line
