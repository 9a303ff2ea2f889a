"""A study in MLflow: what is stored there, and what happens when someone has changed it."""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pytest

from csmae.tracking.destination import check_uri, redacted, tracking_uri
from csmae.tracking.outbox import Outbox, TrackingError, TrackingEvent
from csmae.tracking.tracker import Tracker
from csmae.trial_status import TrialStatus
from tests.support.processes import run_code


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests here: creating its tables takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs/mlflow.db"


@pytest.fixture
def tracker(uri: str, tmp_path: Path) -> Tracker:
    return open_tracker(uri, tmp_path)


def open_tracker(uri: str, folder: Path) -> Tracker:
    tracker = Tracker(folder, folder.name, uri)
    tracker.start({"search.num_trials": 3}, {"csmae.command": "python search.py"}, "val/f1_mean")
    return tracker


def runs(uri: str, folder: Path) -> dict[str, Any]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(folder.name)
    found = client.search_runs([experiment.experiment_id])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found)
    return named


def history(uri: str, run: Any, key: str) -> list[tuple[int, float]]:
    points = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_trials_are_children_of_the_study_with_dotted_parameters_and_epochs(
    tracker: Tracker, uri: str, tmp_path: Path
) -> None:
    tracker.trial(7, {"masking.ratio": 0.65, "model.size": "nano"})
    tracker.epoch(7, 1, {"val/f1_mean": 0.25, "train/loss": 2.0})
    tracker.epoch(7, 2, {"val/f1_mean": 0.5, "train/loss": 1.0})
    tracker.end(7, TrialStatus.COMPLETE, None)
    tracker.finish({"budget/gpu_s": 12.0})
    assert tracker.close(30) == 0
    found = runs(uri, tmp_path)
    study, trial = found[tmp_path.name], found["trial 7"]
    assert trial.data.tags["mlflow.parentRunId"] == study.info.run_id
    assert trial.data.params == {"masking.ratio": "0.65", "model.size": "nano"}
    assert history(uri, trial, "val/f1_mean") == [(1, 0.25), (2, 0.5)]
    assert (study.info.status, trial.info.status) == ("FINISHED", "FINISHED")
    assert study.data.metrics == {"budget/gpu_s": 12.0, "budget/epochs": 2.0}
    experiment = mlflow.MlflowClient(uri).get_experiment(study.info.experiment_id)
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "val/f1_mean"


def test_costs_are_summed_over_each_trial_and_over_the_study(uri: str, tmp_path: Path) -> None:
    first = open_tracker(uri, tmp_path)
    first.trial(0, {})
    first.epoch(0, 1, {"time/worker_s": 2.0, "time/gpu_s": 1.0})
    first.end(0, TrialStatus.RUNNING, "interrupted")
    assert first.close(30) == 0
    second = open_tracker(uri, tmp_path)
    second.trial(0, {})
    second.epoch(0, 1, {"time/worker_s": 2.0, "time/gpu_s": 1.0})
    second.epoch(0, 2, {"time/worker_s": 3.0, "time/gpu_s": 1.5})
    second.end(0, TrialStatus.COMPLETE)
    second.trial(1, {})
    second.epoch(1, 1, {"train/loss": 1.0})
    second.end(1, TrialStatus.PRUNED)
    second.finish({})
    assert second.close(30) == 0
    found = {name: run.data.metrics for name, run in runs(uri, tmp_path).items()}
    costs = {"budget/epochs": 2.0, "budget/worker_s": 5.0, "budget/gpu_s": 2.5}
    assert costs.items() <= found["trial 0"].items()
    assert found["trial 1"] == {"train/loss": 1.0, "budget/epochs": 1.0}
    assert found[tmp_path.name] == costs | {"budget/epochs": 3.0}


def test_states_become_statuses_of_mlflow(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    for number, state in enumerate((TrialStatus.COMPLETE, TrialStatus.PRUNED, TrialStatus.FAIL, TrialStatus.RUNNING)):
        tracker.trial(number, {})
        tracker.end(number, state, "loss is nan" if state is TrialStatus.FAIL else None)
    tracker.close(30)
    found = runs(uri, tmp_path)
    statuses = [found[f"trial {number}"].info.status for number in range(4)]
    assert statuses == ["FINISHED", "KILLED", "FAILED", "KILLED"]
    assert found["trial 2"].data.tags["csmae.reason"] == "loss is nan"
    assert found["trial 3"].data.tags["csmae.state"] == "RUNNING"


def test_a_restart_finds_the_same_runs_and_reopens_an_interrupted_trial(uri: str, tmp_path: Path) -> None:
    first = open_tracker(uri, tmp_path)
    first.trial(0, {"masking.ratio": 0.5})
    first.epoch(0, 1, {"train/loss": 2.0})
    first.end(0, TrialStatus.RUNNING, "interrupted")
    first.close(30)
    before = {name: run.info.run_id for name, run in runs(uri, tmp_path).items()}
    second = open_tracker(uri, tmp_path)
    second.trial(0, {"masking.ratio": 0.5})
    second.epoch(0, 1, {"train/loss": 2.0})
    second.epoch(0, 2, {"train/loss": 1.0})
    second.close(30)
    after = runs(uri, tmp_path)
    assert {name: run.info.run_id for name, run in after.items()} == before
    assert after["trial 0"].info.status == "RUNNING"
    assert history(uri, after["trial 0"], "train/loss") == [(1, 2.0), (2, 1.0)]


def test_a_study_can_resume_with_further_parameters(uri: str, tmp_path: Path) -> None:
    open_tracker(uri, tmp_path).close(30)
    second = Tracker(tmp_path, tmp_path.name, uri)
    second.start({"search.num_trials": 9, "search.seed": 1}, {"csmae.command": "again"}, "val/f1_mean")
    assert second.close(30) == 0
    study = runs(uri, tmp_path)[tmp_path.name]
    assert study.data.params == {"search.num_trials": "3", "search.seed": "1"}
    assert study.data.tags["csmae.command"] == "again"


def test_an_epoch_waits_for_the_fsync_of_its_trials_last_epoch_and_for_nothing_else(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda _: gate.wait(30))
    tracker.trial(0, {})
    tracker.epoch(0, 1, {"train/loss": 2.0})
    tracker.epoch(1, 1, {"train/loss": 2.0})
    second = threading.Thread(target=tracker.epoch, args=(0, 2, {"train/loss": 1.0}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(10)
    assert not second.is_alive()
    tracker.close(30)


def test_nan_infinity_and_forbidden_characters_break_nothing(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    tracker.trial(0, {})
    tracker.epoch(0, 1, {"train/loss": math.nan, "train/lr": math.inf, "val/precision@10": 0.5})
    assert tracker.close(30) == 0
    metrics = runs(uri, tmp_path)["trial 0"].data.metrics
    assert math.isnan(metrics["train/loss"])
    assert metrics["train/lr"] > 1e300
    assert metrics["val/precision_10"] == 0.5


def test_values_over_the_limit_are_shortened_and_kept_whole_as_an_artifact(
    tracker: Tracker, uri: str, tmp_path: Path
) -> None:
    whole = "".join(str(digit % 10) for digit in range(20_000))
    tracker.trial(0, {"data.note": whole} | {f"many.p{index}": index for index in range(250)})
    tracker.end(0, TrialStatus.FAIL, whole)
    assert tracker.close(30) == 0
    run = runs(uri, tmp_path)["trial 0"]
    assert len(run.data.params) == 251
    assert run.data.params["data.note"] == whole[:5997] + "..."
    kept = mlflow.MlflowClient(uri).download_artifacts(run.info.run_id, "long_values")
    contents = [json.loads(path.read_text()) for path in sorted(Path(kept).iterdir())]
    assert {"data.note": whole} in contents
    assert {"csmae.reason": whole} in contents


def test_more_epochs_than_fit_into_one_request_are_all_stored(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    tracker.trial(0, {})
    for epoch in range(1, 301):
        tracker.epoch(0, epoch, {f"m{index}": float(epoch) for index in range(5)})
    assert tracker.close(60) == 0
    trial = runs(uri, tmp_path)["trial 0"]
    assert history(uri, trial, "m4") == [(epoch, float(epoch)) for epoch in range(1, 301)]


def test_artifacts_are_stored_under_their_artifact_path(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "a.png").write_bytes(b"png")
    tracker.trial(0, {})
    tracker.artifact(None, plots / "a.png", "")
    tracker.artifact(0, plots, "epoch 1")
    assert tracker.close(30) == 0
    client, found = mlflow.MlflowClient(uri), runs(uri, tmp_path)
    assert [file.path for file in client.list_artifacts(found[tmp_path.name].info.run_id)] == ["a.png"]
    assert [file.path for file in client.list_artifacts(found["trial 0"].info.run_id, "epoch 1")] == ["epoch 1/a.png"]


def test_a_missing_file_is_logged_and_the_rest_is_stored(
    tracker: Tracker, uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tracker.trial(0, {})
        tracker.artifact(0, tmp_path / "no.png", "")
        tracker.epoch(0, 1, {"train/loss": 1.0})
        assert tracker.close(30) == 0
    assert "rejected trial 0: artifact: " in caplog.text
    assert runs(uri, tmp_path)["trial 0"].data.metrics == {"train/loss": 1.0}


def test_an_event_of_another_version_delays_nothing(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    outbox.append(TrackingEvent("end", 0, 1, {"state": "COMPLETE", "reason": None}))
    outbox.append(TrackingEvent("end", 2, 1, {"state": "PAUSED", "reason": None, "step": 1, "metrics": {}}))
    outbox.close()
    with caplog.at_level(logging.WARNING):
        tracker = open_tracker(uri, tmp_path)
        tracker.epoch(1, 1, {"train/loss": 1.0})
        assert tracker.close(30) == 0
    assert "rejected trial 0: end: the event has no 'step'" in caplog.text
    assert "rejected trial 2: end: the event has no 'PAUSED'" in caplog.text
    assert runs(uri, tmp_path)["trial 1"].data.metrics == {"train/loss": 1.0}


START_AGAIN = """
import sys
from pathlib import Path
from csmae.tracking.tracker import Tracker
tracker = Tracker(Path(sys.argv[1]), "study", sys.argv[2])
tracker.start({}, {}, "val/f1_mean")
sys.exit(tracker.close(30))
"""


def test_a_deleted_database_is_filled_again_from_the_outbox(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = open_tracker(uri, tmp_path / "study")
    first.trial(0, {"masking.ratio": 0.5})
    first.epoch(0, 1, {"train/loss": 2.0})
    first.close(30)
    (tmp_path / "mlflow.db").rename(tmp_path / "refilled.db")
    assert run_code(START_AGAIN, tmp_path / "study", uri).returncode == 0
    (tmp_path / "mlflow.db").rename(tmp_path / "refilled.db")
    trial = runs(f"sqlite:///{tmp_path}/refilled.db", tmp_path / "study")["trial 0"]
    assert history(f"sqlite:///{tmp_path}/refilled.db", trial, "train/loss") == [(1, 2.0)]
    assert trial.data.params == {"masking.ratio": "0.5"}


def test_a_deleted_trial_stays_deleted_and_is_logged_while_the_others_continue(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_tracker(uri, tmp_path)
    first.trial(0, {})
    first.close(30)
    deleted = runs(uri, tmp_path)["trial 0"].info.run_id
    mlflow.MlflowClient(uri).delete_run(deleted)
    with caplog.at_level(logging.WARNING):
        second = open_tracker(uri, tmp_path)
        second.epoch(0, 1, {"train/loss": 1.0})
        second.trial(1, {})
        assert second.close(30) == 0
    assert f"restore it with `mlflow runs restore --run-id {deleted}`" in caplog.text
    assert set(runs(uri, tmp_path)) == {tmp_path.name, "trial 1"}


def test_a_deleted_experiment_is_logged_and_all_events_wait(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_tracker(uri, tmp_path).close(30)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(tmp_path.name).experiment_id
    client.delete_experiment(experiment)
    with caplog.at_level(logging.WARNING):
        second = open_tracker(uri, tmp_path)
        second.trial(0, {})
        assert second.close(2) == 2
    assert f"mlflow experiments restore -x {experiment}" in caplog.text
    client.restore_experiment(experiment)
    third = open_tracker(uri, tmp_path)
    assert third.close(30) == 0
    assert set(runs(uri, tmp_path)) == {tmp_path.name, "trial 0"}


def test_an_experiment_of_another_study_is_not_changed(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = open_tracker(uri, tmp_path / "theirs" / "study")
    theirs.close(30)
    with caplog.at_level(logging.WARNING):
        ours = open_tracker(uri, tmp_path / "ours" / "study")
        ours.trial(0, {})
        assert ours.close(2) > 0
    assert "is another study's: give this one another --name" in caplog.text
    assert set(runs(uri, tmp_path / "study")) == {"study"}


CLOSED_EARLY = """
import sys
from pathlib import Path
from csmae.tracking.tracker import Tracker
tracker = Tracker(Path(sys.argv[1]), Path(sys.argv[1]).name, sys.argv[2])
tracker.trial(0, {})
tracker.epoch(0, 1, {"train/loss": 1.0})
sys.exit(tracker.close(1))
"""


def test_a_locked_database_delays_nothing_and_gets_all_events_later(uri: str, tmp_path: Path) -> None:
    open_tracker(uri, tmp_path).close(30)
    lock = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level="EXCLUSIVE")
    lock.execute("BEGIN EXCLUSIVE")
    assert run_code(CLOSED_EARLY, tmp_path, uri).returncode == 2
    lock.rollback()
    lock.close()
    assert open_tracker(uri, tmp_path).close(30) == 0
    assert runs(uri, tmp_path)["trial 0"].data.metrics == {"train/loss": 1.0}


@pytest.mark.parametrize("uri", ["runs/mlflow.db", "file:///tmp/mlruns", "htp://server", ""])
def test_a_uri_that_mlflow_does_not_support_is_rejected(uri: str) -> None:
    with pytest.raises(TrackingError, match="must start with sqlite:///"):
        check_uri(uri)


def test_the_destination_is_the_option_or_the_environment_or_the_storage_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri("sqlite:///x.db", Path("runs")) == "sqlite:///x.db"
    assert tracking_uri(None, Path("runs")) == "http://server:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(None, Path("runs")) == "sqlite:///runs/mlflow.db"
    assert tracking_uri(None, Path("runs"), "wandb") == "wandb://csmae"
    assert tracking_uri("team/project", Path("runs"), "wandb") == "wandb://team/project"
    assert tracking_uri("wandb://project", Path("runs"), "wandb") == "wandb://project"


def test_a_password_in_the_uri_is_removed() -> None:
    assert redacted("https://anna:secret@host:5000/x") == "https://host:5000/x"
    assert redacted("sqlite:////srv/runs/mlflow.db") == "sqlite:////srv/runs/mlflow.db"


def test_importing_the_tracker_imports_no_mlflow() -> None:
    program = "import sys, csmae.tracking.tracker; print('mlflow' in sys.modules or 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
