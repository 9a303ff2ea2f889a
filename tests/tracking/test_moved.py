"""A folder of studies that is moved, renamed or copied keeps working, and nothing is written to its old path."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from safetensors.numpy import save_file

from csmae.cli.main import main
from csmae.tracking.fetch import fetch_encoder
from csmae.tracking.mlflow_database import moved_locations, update_locations
from csmae.tracking.outbox import Outbox, TrackingEvent
from csmae.tracking.tracker import Tracker, upload
from csmae.trial_status import TrialStatus
from tests.tracking.test_registry import REAL, empty_database, same_files

__all__ = ["empty_database"]


@pytest.fixture
def runs(tmp_path: Path, empty_database: Path) -> Path:
    """A folder of studies with an empty database."""
    folder = tmp_path / "old home" / "runs"
    folder.mkdir(parents=True)
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


def database_uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def search(folder: Path, number: int, name: str = "masking") -> Path:
    """Track one more trial of a study, which becomes its champion; returns its encoder's folder."""
    study = folder / name
    files = study / "trials" / str(number) / "encoder"
    files.mkdir(parents=True)
    save_file({"w": np.full(5, number, np.float32)}, files / "encoder.safetensors")
    settings = {"bands": {"s1": ["VH", "VV"], "s2": ["B02", "B03"]}, "model": {"size": "nano"}}
    (files / "config.json").write_text(json.dumps(settings))
    (study / "report.html").write_text(f"<p>{number}</p>")
    plots = files.parent / "plots"
    plots.mkdir()
    (plots / "epoch.png").write_bytes(b"png")
    _artifact_repos_cache.clear()  # as in a new process: MLflow caches by run where files go
    tracker = Tracker(study, name, database_uri(folder))
    tracker.start({}, {"csmae.command": "python search.py"}, "val/f1_mean")
    tracker.trial(number, {})
    tracker.epoch(number, 1, {"val/f1_mean": number / 10})
    tracker.end(number, TrialStatus.COMPLETE)
    tracker.champion(number, files, {"val/f1_mean": number / 10}, REAL)
    tracker.finish({})
    tracker.artifact(None, study / "report.html", "report")
    tracker.artifact(number, plots, "plots")
    assert tracker.close(30) == 0
    assert tracker.rejected == []
    return files


def files_of(uri: str) -> dict[str, list[str]]:
    """The artifacts that MLflow finds, by run."""
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("masking").experiment_id])
    folders = {run.info.run_name: Path(client.download_artifacts(run.info.run_id, "")) for run in runs}
    return {name: sorted(path.name for path in folder.rglob("*.*")) for name, folder in folders.items()}


def logged_models(uri: str) -> list[Any]:
    client = mlflow.MlflowClient(uri)
    return list(client.search_logged_models([client.get_experiment_by_name("masking").experiment_id]))


def test_after_a_move_encoders_load_and_new_files_go_to_the_new_path(runs: Path, tmp_path: Path) -> None:
    search(runs, 1)
    home = tmp_path / "new home"
    runs.parent.rename(home)
    (tmp_path / "old home").write_text("a folder cannot be made here")
    moved = home / "runs"
    encoder = moved / "masking" / "trials" / "1" / "encoder"
    (model,) = logged_models(database_uri(moved))
    for uri in ("models:/csmae-encoder@champion", f"models:/{model.model_id}", f"runs:/{model.source_run_id}"):
        assert same_files(fetch_encoder(uri, database_uri(moved)), encoder)
    better = search(moved, 2)
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", database_uri(moved)), better)
    assert files_of(database_uri(moved)) == {
        "masking": ["report.html"],
        "trial 1": ["epoch.png"],
        "trial 2": ["epoch.png"],
    }
    (location,) = [m.artifact_location for m in logged_models(database_uri(moved)) if m.model_id == model.model_id]
    assert same_files(Path(mlflow.artifacts.download_artifacts(location)), encoder)


def test_nothing_that_is_stored_names_the_old_path_after_a_move(runs: Path, tmp_path: Path) -> None:
    search(runs, 1)
    assert str(tmp_path) not in (runs / "masking" / "outbox.jsonl").read_text()
    assert str(tmp_path) not in (runs / "masking" / "outbox.uploaded").read_text()
    (tmp_path / "old home").rename(tmp_path / "new home")
    moved = tmp_path / "new home" / "runs"
    assert upload(moved / "masking", database_uri(moved), 30) == (0, [])
    with closing(sqlite3.connect(moved / "mlflow.db")) as database:
        dump = "\n".join(database.iterdump())
    assert "old%20home" not in dump
    assert "old home" not in dump
    assert "new%20home" in dump


def test_a_copy_and_its_original_continue_independently(runs: Path, tmp_path: Path) -> None:
    search(runs, 1)
    copy = tmp_path / "copy"
    shutil.copytree(runs, copy)
    before = sorted(path for path in runs.rglob("*") if path.is_file())
    search(copy, 2)
    assert sorted(path for path in runs.rglob("*") if path.is_file()) == before
    assert "trial 2" in files_of(database_uri(copy))
    search(runs, 3)
    assert set(files_of(database_uri(runs))) == {"masking", "trial 1", "trial 3"}
    assert set(files_of(database_uri(copy))) == {"masking", "trial 1", "trial 2"}


def test_a_database_that_was_copied_without_its_files_finds_the_old_ones(runs: Path, tmp_path: Path) -> None:
    files = search(runs, 1)
    (tmp_path / "copy").mkdir()
    shutil.copy(runs / "mlflow.db", tmp_path / "copy")
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", database_uri(tmp_path / "copy")), files)


def location(folder: Path, name: str) -> str:
    return str(mlflow.MlflowClient(database_uri(folder)).get_experiment_by_name(name).artifact_location)


def test_a_study_that_another_machine_mounts_at_another_path_does_not_move_running_studies(
    runs: Path, tmp_path: Path
) -> None:
    search(runs, 1, "live")
    search(runs, 1)
    here = tmp_path / "as mounted elsewhere"
    runs.rename(here)
    search(here, 2)
    assert location(here, "live") == (runs / "mlartifacts" / "live").as_uri()
    assert location(here, "masking") == (here / "mlartifacts" / "masking").as_uri()
    here.rename(runs)
    live = search(runs, 2, "live")
    assert live.parent.parent.parent.parent == runs
    assert not here.exists()
    assert same_files(fetch_encoder("models:/csmae-encoder@champion-live", database_uri(runs)), live)


def test_files_that_are_only_out_of_reach_are_kept(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = search(runs, 1)
    copy, away = tmp_path / "copy", tmp_path / "not mounted"
    shutil.copytree(runs, copy, ignore=shutil.ignore_patterns("mlartifacts"))
    (tmp_path / "old home").rename(away)
    assert upload(copy / "masking", database_uri(copy), 1) == (0, [])
    (message,) = [line for line in caplog.messages if "mount" in line]
    assert str(runs / "mlartifacts" / "masking") in message
    assert f"make the folder {copy / 'mlartifacts' / 'masking'} if they are lost" in message
    away.rename(tmp_path / "old home")
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", database_uri(copy)), files)
    assert upload(copy / "masking", database_uri(copy), 30) == (0, [])
    assert location(copy, "masking") == (runs / "mlartifacts" / "masking").as_uri()


def test_a_study_that_moves_before_it_has_files_stores_them_at_the_new_path(runs: Path, tmp_path: Path) -> None:
    tracker = Tracker(runs / "masking", "masking", database_uri(runs))
    tracker.start({}, {}, "val/f1_mean")
    assert tracker.close(30) == 0
    moved = tmp_path / "moved"
    runs.parent.rename(moved)
    search(moved / "runs", 1)
    assert not runs.parent.exists()
    assert location(moved / "runs", "masking") == (moved / "runs" / "mlartifacts" / "masking").as_uri()


def test_a_location_that_a_server_chose_stays(runs: Path) -> None:
    client = mlflow.MlflowClient(database_uri(runs))
    client.create_experiment("masking", "file:///srv/mlflow/mlartifacts/7", {"csmae.study_id": "x"})
    (runs / "mlartifacts" / "7").mkdir(parents=True)
    assert moved_locations(runs / "mlflow.db") == {}
    update_locations(database_uri(runs), "masking")
    assert location(runs, "masking") == "file:///srv/mlflow/mlartifacts/7"


def test_a_driver_name_in_the_uri_changes_nothing(runs: Path, tmp_path: Path) -> None:
    files = search(runs, 1)
    runs.parent.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "runs"
    uri = f"sqlite+pysqlite:///{moved}/mlflow.db"
    files = moved / files.relative_to(runs)
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", uri), files)
    assert upload(moved / "masking", uri, 30) == (0, [])
    assert location(moved, "masking") == (moved / "mlartifacts" / "masking").as_uri()


def test_a_folder_that_is_reached_through_a_link_has_not_moved(runs: Path, tmp_path: Path) -> None:
    search(runs, 1)
    (tmp_path / "link").symlink_to(runs)
    assert upload(tmp_path / "link" / "masking", database_uri(tmp_path / "link"), 30, again=True) == (0, [])
    experiment = mlflow.MlflowClient(database_uri(runs)).get_experiment_by_name("masking")
    assert experiment.artifact_location == (runs / "mlartifacts" / "masking").as_uri()


def test_after_a_move_a_whole_study_can_be_sent_to_another_database(
    runs: Path, tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search(runs, 1)
    moved = tmp_path / "moved"
    runs.rename(moved)
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    assert main(["sync", "masking", "--storage", str(moved), "--mlflow-uri", other]) == 0
    assert capsys.readouterr().out == f"masking is complete in {other}\n"
    assert files_of(other) == {"masking": ["report.html"], "trial 1": ["epoch.png"]}
    encoder = moved / "masking" / "trials" / "1" / "encoder"
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", other), encoder)


def synced(folder: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    status = main(["sync", "masking", "--storage", str(folder), "--mlflow-uri", uri])
    return status, capsys.readouterr().out.splitlines()


def test_sync_reports_what_was_rejected_and_sends_it_once_it_can(
    runs: Path, tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = search(runs, 1)
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    report, away = runs / "masking" / "report.html", tmp_path / "away"
    away.mkdir()
    for path in (report, encoder):
        path.rename(away / path.name)
    for _ in range(2):
        status, lines = synced(runs, other, capsys)
        assert status == 1
        assert lines[:2] == [
            f"rejected: trial 1: champion: {encoder}: no encoder: encoder.safetensors cannot be read: No such file or directory: "
            "restore the file, or name another encoder",
            f"rejected: the study: artifact: {report} no longer exists",
        ]
        assert lines[2].startswith(f"masking is incomplete in {other}")
    for path in (report, encoder):
        (away / path.name).rename(path)
    assert synced(runs, other, capsys) == (0, [f"masking is complete in {other}"])
    assert files_of(other) == {"masking": ["report.html"], "trial 1": ["epoch.png"]}
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", other), encoder)


def test_an_encoder_that_is_missing_when_the_search_last_ended_is_reported(runs: Path) -> None:
    search(runs, 1)
    outbox, missing_dir = Outbox(runs / "masking" / "outbox.jsonl"), runs / "masking" / "trials" / "0" / "encoder"
    (start,) = (event for event in outbox.read(0, 99)[0] if event.kind == "start")
    (champion,) = (event for event in outbox.read(0, 99)[0] if event.kind == "champion")
    missing = TrackingEvent("encoder", 0, champion.time_ms, champion.body | {"encoder_dir": str(missing_dir)})
    for event in (start, missing, champion):
        outbox.append(event)
    outbox.close()
    num_unsent, (rejection,) = upload(runs / "masking", database_uri(runs), 30)
    assert num_unsent == 0
    assert rejection.startswith(f"trial 0: encoder: {missing_dir}: no encoder")


def test_a_rejected_champion_takes_no_alias_from_the_one_that_replaced_it(
    runs: Path, tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = search(runs, 3)
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    first.rename(tmp_path / "away")
    assert synced(runs, other, capsys)[0] == 1
    second = shutil.copytree(tmp_path / "away", runs / "masking" / "trials" / "2" / "encoder")
    tracker = Tracker(runs / "masking", "masking", other)
    tracker.start({}, {}, "val/f1_mean")
    time.sleep(1.5)  # the first champion is sent again, and rejected, before the second one is reported
    tracker.champion(2, second, {"val/f1_mean": 0.2}, REAL)
    assert tracker.close(30) == 0
    (tmp_path / "away").rename(first)
    assert synced(runs, other, capsys) == (0, [f"masking is complete in {other}"])
    for alias in ("champion", "champion-masking"):
        version = mlflow.MlflowClient(other).get_model_version_by_alias("csmae-encoder", alias)
        assert version.tags["csmae.trial"] == "2"


def test_missing_files_of_a_former_champion_are_not_reported(
    runs: Path, tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beaten = search(runs, 1)
    search(runs, 2)
    shutil.rmtree(beaten)  # only the best trials keep their files
    shutil.copy(empty_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    assert synced(runs, other, capsys) == (0, [f"masking is complete in {other}"])
