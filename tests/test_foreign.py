"""Commands reject whatever is not an encoder, a feature store or an MLflow database, in one line with exit code 2."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from csmae.cli.main import main
from csmae.data.archive import open_archive
from csmae.retrieval.store import Source, write_store
from csmae.sqlite import sqlite_url
from csmae.tracking.destination import unreachable
from csmae.tracking.outbox import TrackingError
from csmae.tracking.tracker import Tracker
from csmae.trials.database import open_storage
from tests.retrieval.conftest import encoder, encoder_dir
from tests.retrieval.test_stores_and_queries import data, ignore
from tests.tracking.test_registry import empty_database

__all__ = ["data", "empty_database", "encoder", "encoder_dir"]

MODEL = "models:/csmae-encoder@champion"

PLACES = {
    "text.db": "is not an SQLite database",
    "cut.db": "its database is damaged",
    "scrambled.db": "its database is damaged",
    "foreign.db": "is another program's database",
    "studies.db": "is another program's database",
    "old.db": "was written by another version of MLflow",
    "new.db": "was written by another version of MLflow",
    "missing.db": "there is no",
    "empty.db": "is empty",
    "folder.db": "is a folder",
}
"""Files in place of MLflow's database, and the error for each."""


@pytest.fixture(scope="module")
def places(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    (folder / "text.db").write_text("This is not a database.")
    (folder / "cut.db").write_bytes(empty_database.read_bytes()[:5000] + bytes(5000))
    (folder / "scrambled.db").write_bytes(empty_database.read_bytes()[:16] + b"scrambled" * 1000)
    (folder / "empty.db").touch()
    (folder / "folder.db").mkdir()
    with closing(sqlite3.connect(folder / "foreign.db")) as database:
        database.execute("CREATE TABLE photographs (name TEXT)")
    optuna.create_study(storage=open_storage(folder / "studies.db"))
    for name, version in (("old.db", "728d730b5ebd"), ("new.db", "ffffffffffff")):
        shutil.copy(empty_database, folder / name)
        with closing(sqlite3.connect(folder / name, isolation_level=None)) as database:
            database.execute("UPDATE alembic_version SET version_num = ?", (version,))
    return folder


def rejected(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; return its error, which is one line."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", PLACES)
def test_a_file_that_is_not_an_mlflow_database_is_named_and_not_changed(
    places: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = places / name
    before = path.read_bytes() if path.is_file() else None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_url(path))
    line = rejected(capsys, "export", MODEL, tmp_path / "hub")
    assert PLACES[name] in line
    assert str(path) in line
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("name", ["foreign.db", "studies.db"])
def test_a_foreign_database_is_detected_with_a_driver_in_the_uri(
    places: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (places / name).read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite+pysqlite:///{places / name}")
    assert PLACES[name] in rejected(capsys, "export", MODEL, tmp_path / "hub")
    assert (places / name).read_bytes() == before


@pytest.mark.parametrize("uri", ["mlruns", "file:///srv/mlruns", "nonsense://x", "http://127.0.0.1:9"])
def test_an_unknown_or_unreachable_tracking_uri_is_named(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert uri in rejected(capsys, "export", MODEL, tmp_path / "hub")


@pytest.mark.parametrize("command", ["embed", "retrieve", "evaluate"])
def test_every_command_that_takes_an_encoder_rejects_what_is_none(
    command: str,
    places: Path,
    data: Any,
    encoder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_url(places / "old.db"))
    store = tmp_path / "store"
    if command == "retrieve":
        write_store(store, encoder, Source(data, "validation", ("s1", "s2")), "float16", ignore)
    words = {
        "embed": ["embed", data.path, store],
        "retrieve": ["retrieve", "--store", store, "--query", "x", "--sensor", "s1"],
        "evaluate": ["evaluate", data.path],
    }[command]
    assert "was written by another version of MLflow" in rejected(capsys, *words, "--encoder", MODEL)
    (tmp_path / "plain").mkdir()
    assert "config.json: cannot be read" in rejected(capsys, *words, "--encoder", tmp_path / "plain")
    (tmp_path / "file").touch()
    line = rejected(capsys, *words, "--encoder", tmp_path / "file")
    assert "config.json: cannot be read" in line
    assert not (tmp_path / "store" / "store.json").exists() or command == "retrieve"


@pytest.mark.parametrize("name", ["text.db", "foreign.db", "studies.db", "folder.db"])
def test_a_search_does_not_start_on_another_programs_database(places: Path, name: str, tmp_path: Path) -> None:
    uri = sqlite_url(places / name)
    before = (places / name).read_bytes() if (places / name).is_file() else None
    with pytest.raises(TrackingError, match=PLACES[name]):
        Tracker(tmp_path / "study", "study", uri)
    assert PLACES[name] in str(unreachable(uri))
    assert ((places / name).read_bytes() if (places / name).is_file() else None) == before


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"bands": ["VV"]}, "is for other bands"),
        ({"bands": {"s1": 3}}, "is for other bands"),
        ({"model": []}, "do not match"),
        ({"model": {"size": "nano", "depth": 3}}, "do not match"),
        ({"statistics": 3}, "do not match"),
        ({"statistics": {"s1_mean": "x"}}, "do not match"),
        ({"sha256": 3}, "does not match the checksum"),
    ],
)
def test_invalid_encoder_settings_are_rejected_in_one_line(
    encoder_dir: Path, tmp_path: Path, change: dict[str, Any], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(encoder_dir, tmp_path / "encoder")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    assert error in rejected(capsys, "export", folder, tmp_path / "hub")


@pytest.mark.parametrize("details", [None, [], {"metrics": 3}, {"metrics": {"val/f1_mean": "high"}}, {"study": {}}])
def test_an_encoder_with_invalid_details_is_exported_without_them(
    encoder_dir: Path, tmp_path: Path, details: Any
) -> None:
    folder = shutil.copytree(encoder_dir, tmp_path / "encoder")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"details": details}))
    assert main(["export", str(folder), str(tmp_path / "hub")]) == 0
    assert "| Study |" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("store.json", {"num_scenes": "many"}, "num_scenes cannot be 'many'"),
        ("store.json", {"sensors": "s1"}, "sensors cannot be 's1'"),
        ("store.json", {"sensors": ["s3"]}, "unknown split or sensor: choose a new folder"),
        ("store.json", {"width": None}, "width cannot be None"),
        ("store.json", {"path": 3}, "path cannot be 3"),
        ("store.json", {"split": "summer"}, "unknown split or sensor: choose a new folder"),
        ("labels.npy", np.zeros((3, 19), bool), "labels.npy"),
        ("names.npy", np.zeros(3), "names.npy"),
    ],
)
def test_a_feature_store_with_inconsistent_files_is_rejected_in_one_line(
    data: Any,
    encoder: Any,
    encoder_dir: Path,
    tmp_path: Path,
    name: str,
    content: Any,
    error: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    write_store(store, encoder, Source(data, "validation", ("s1",)), "float16", ignore)
    if name.endswith(".npy"):
        np.save(store / name, content)
    else:
        (store / name).write_text(json.dumps(json.loads((store / name).read_text()) | content))
    words = ["retrieve", "--store", store, "--query", "x", "--sensor", "s1", "--encoder", encoder_dir]
    assert error in rejected(capsys, *words)


def test_a_feature_store_and_its_archive_may_move_together(
    data: Any, encoder: Any, encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    archive = shutil.copytree(data.path, home / "archive")
    here = data.model_copy(update={"path": str(archive)})
    write_store(home / "store", encoder, Source(here, "validation", ("s1",)), "float16", ignore)
    name = open_archive(here).split("validation").names[0]
    home.rename(tmp_path / "moved")
    options = ["--query", name, "--sensor", "s1", "--encoder", str(encoder_dir), "--k", "2"]
    options += ["--output", str(tmp_path / "found.png")]
    assert main(["retrieve", "--store", str(tmp_path / "moved" / "store"), *options]) == 0
    assert (tmp_path / "found.png").exists()
    (tmp_path / "moved" / "archive").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    line = rejected(capsys, "retrieve", "--store", tmp_path / "moved" / "store", *options)
    assert "embed" in line
