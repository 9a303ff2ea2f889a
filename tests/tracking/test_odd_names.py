"""Names and paths with characters that are special in a URI, in SQLite, in MLflow or in a shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import mlflow
import optuna
import pytest

from csmae.cli import finish
from csmae.config import Config, ConfigError
from csmae.console.tables import format_studies
from csmae.sqlite import sqlite_path, sqlite_url
from csmae.storage.layout import DATABASE
from csmae.study.study import load_study
from csmae.tracking.destination import tracking_uri
from csmae.tracking.fetch import fetch_encoder
from csmae.tracking.provenance import command
from csmae.tracking.tracker import Tracker
from csmae.trials.store import TrialStore
from csmae.tuning.champion import EncoderToScore
from tests.study.test_study import write
from tests.tracking.test_registry import REAL, empty_database, encoder, same_files

__all__ = ["empty_database"]

SPACE = {"masking.ratio": {"float": [0.3, 0.9]}}

ODD = ["two words", "50%", "100%25", "what?", "no#1", "a;b&c", "it's", "größe", "[x]"]


@pytest.mark.parametrize("name", ["what? 100%25 50%", "two no#1 a;b&c it's größe [x]"])
def test_a_storage_folder_of_any_name_holds_its_databases_and_files(name: str, tmp_path: Path) -> None:
    storage = tmp_path / name
    trial_store = TrialStore(load_study(write(tmp_path, SPACE), "study"), storage)
    assert "study" in [str(cell) for cell in format_studies(storage / DATABASE).columns[0].cells]
    uri = tracking_uri(None, storage)
    files = encoder(trial_store.run_dir(0) / "encoder", 1)
    tracker = Tracker(trial_store.folder, "study", uri)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(0, {})
    tracker.champion(0, files, {"val/f1_mean": 0.5}, REAL)
    tracker.artifact(0, files / "config.json", "files")
    assert tracker.close(30) == 0
    assert same_files(fetch_encoder("models:/csmae-encoder@champion-study", uri), files)
    assert sorted(path.name for path in storage.iterdir() if path.name[0] != ".") == [
        "mlartifacts",
        "mlflow.db",
        "studies.db",
        "study",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "study.yaml"])


@pytest.mark.parametrize("name", ODD)
def test_the_url_of_an_sqlite_file_is_parsed_to_its_path(name: str) -> None:
    assert sqlite_path(sqlite_url(Path(name) / "mlflow.db")) == Path(name) / "mlflow.db"
    assert sqlite_url(Path("my runs/mlflow.db")) == "sqlite:///my runs/mlflow.db"
    assert sqlite_path("sqlite:///x.db?timeout=3") == Path("x.db")
    assert sqlite_path("sqlite+pysqlite:///x.db") == Path("x.db")
    assert sqlite_path("http://server") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-rf", "not begin with '-' or '.'"),
        (".hidden", "not begin with '-' or '.'"),
        ("two words", "letters, digits"),
        ("a/b", "letters, digits"),
        ("x" * 129, "at most 128 bytes, found 129"),
        ("studies.db", "a file of the storage has this name"),
        ("Studies.DB-journal", "a file of the storage has this name"),
        ("mlflow.db", "a file of the storage has this name"),
        ("mlartifacts", "a file of the storage has this name"),
        ("mlruns", "a file of the storage has this name"),
    ],
)
def test_a_study_cannot_be_named_like_an_option_or_a_file_of_the_storage(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(tmp_path, SPACE), name)


def test_printed_commands_survive_copy_and_paste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = tmp_path / 'my "runs" & more; it\'s'
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["search.py", "study.yaml", "--storage", str(storage), "--num-trials", "3"])
    trial = optuna.trial.create_trial(value=0.5)
    champion = EncoderToScore("champion", Config(), trial, storage / "study" / "trials" / "0" / "encoder")
    stores = [TrialStore(load_study(write(tmp_path, SPACE), name), storage) for name in ("losses_v1.2", "study")]
    uri = tracking_uri(None, storage)
    lines = dict(line.split(":", 1) for line in finish._next_steps(stores[0], champion, uri) if ":" in line[:10])
    assert shlex.split(lines["compare"]) == ["mlflow", "ui", "--backend-store-uri", uri]
    assert shlex.split(lines["extend"]) == [
        "python",
        "search.py",
        "study.yaml",
        "--storage",
        str(storage),
        "--num-trials",
        "N",
    ]
    assert "champion-losses_v1.2" not in lines["load it"]
    uri = tracking_uri(None, storage, "wandb")
    lines = dict(line.split(":", 1) for line in finish._next_steps(stores[1], champion, uri) if ":" in line[:10])
    loaded: list[str] = []
    eval(lines["load it"].strip(), {"csmae": type("csmae", (), {"load_encoder": loaded.append})})
    assert loaded == [str(champion.encoder_dir)]


def test_a_printed_command_contains_no_password_whatever_its_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "https://anna:se cr@t'x@host:5000/x"
    monkeypatch.setattr(sys, "argv", ["search.py", "a b.yaml", "--mlflow-uri", uri])
    assert shlex.split(command()) == ["python", "search.py", "a b.yaml", "--mlflow-uri", "https://host:5000/x"]


def test_commands_that_restore_a_deleted_experiment_name_the_tracking_uri(
    tmp_path: Path, empty_database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my runs").mkdir()
    shutil.copy(empty_database, tmp_path / "my runs")
    uri = sqlite_url(tmp_path / "my runs" / "mlflow.db")
    Tracker(tmp_path / "study", "study", uri).close(30)
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.get_experiment_by_name("study").experiment_id)
    tracker = Tracker(tmp_path / "study", "study", uri)
    tracker.trial(0, {})
    assert tracker.close(1) == 1
    assert f"MLFLOW_TRACKING_URI={shlex.quote(uri)}" in caplog.text
