"""Real tracking servers on the loopback: healthy, stopped, killed, failing, protected by a password."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from safetensors.numpy import save_file

from csmae.cli.main import main
from csmae.tracking.fetch import fetch_encoder
from csmae.tracking.tracker import Tracker, upload
from csmae.trial_status import TrialStatus
from tests.support.tracking_server import Server
from tests.tracking.test_moved import files_of, search

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


def report(tracker: Tracker, trials: range, epochs: int) -> float:
    """Report trials as a search does; returns the longest duration of a call, seconds."""
    longest = 0.0
    for number in trials:
        tracker.trial(number, {"masking.ratio": number / 10})
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            tracker.epoch(number, epoch, {"train/loss": 1 / epoch, "val/f1_mean": number + epoch / 100})
            longest = max(longest, time.perf_counter() - start)
        tracker.end(number, TrialStatus.COMPLETE)
    return longest


def is_complete(uri: str, study: str, trials: int, epochs: int) -> bool:
    """Whether MLflow holds one run per trial and each epoch once."""
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(study)
    found = client.search_runs([experiment.experiment_id], "tags.`csmae.run` != 'study'", max_results=1000)
    names = sorted(run.info.run_name for run in found)
    assert names == sorted(f"trial {number}" for number in range(trials))
    for run in found:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "val/f1_mean")]
        assert sorted(steps) == list(range(1, epochs + 1))
    return True


def start(folder: Path, uri: str) -> Tracker:
    tracker = Tracker(folder, folder.name, uri)
    tracker.start({"search.seed": 0}, {"csmae.command": "python search.py"}, "val/f1_mean")
    return tracker


def encoder(folder: Path) -> Path:
    folder.mkdir()
    save_file({"w": np.ones(100_000, np.float32)}, folder / "encoder.safetensors")
    (folder / "config.json").write_text(json.dumps({"bands": {"s1": ["VH", "VV"], "s2": ["B02"]}}))
    return folder


def test_a_study_and_its_encoder_are_stored_on_a_server_and_fetched_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tracker = start(tmp_path / "healthy", server.uri)
    report(tracker, range(3), 5)
    files = encoder(tmp_path / "files")
    tracker.champion(2, files, {"val/f1_mean": 2.05}, {"csmae.data": "synthetic"})
    tracker.finish({"budget/gpu_s": 1.0})
    assert tracker.close(60) == 0
    assert is_complete(server.uri, "healthy", 3, 5)
    fetched = fetch_encoder("models:/csmae-encoder@champion", server.uri)
    assert (fetched / "encoder.safetensors").read_bytes() == (files / "encoder.safetensors").read_bytes()
    assert fetched.is_relative_to(tmp_path / "cache")
    assert fetch_encoder("models:/csmae-encoder@champion", server.uri) == fetched


def test_a_server_that_hangs_delays_no_epoch_and_gets_all_events_when_it_resumes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    tracker = start(tmp_path / "hanging", server.uri)
    report(tracker, range(2), 5)
    server.signal(signal.SIGSTOP)
    try:
        longest = report(tracker, range(2, 6), 5)
        time.sleep(5)
        longest = max(longest, report(tracker, range(6, 8), 5))
    finally:
        server.signal(signal.SIGCONT)
    tracker.finish({})
    assert tracker.close(90) == 0
    assert longest < 0.5
    assert is_complete(server.uri, "hanging", 8, 5)


def test_a_server_that_is_killed_gets_all_events_when_it_is_back(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(tmp_path / "killed", server.uri)
    report(tracker, range(2), 5)
    time.sleep(1)
    server.signal(signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        report(tracker, range(2, 4), 5)
        time.sleep(2)
        server.start()
        tracker.finish({})
        assert tracker.close(90) == 0
    assert is_complete(server.uri, "killed", 4, 5)
    failed, back = caplog.messages
    assert re.fullmatch(rf"{server.uri}: (nothing answers there|broke off .*); events wait in .*/outbox.jsonl", failed)
    assert back == f"{server.uri} answers again"


def test_a_search_that_never_reached_the_server_is_uploaded_later(server: Server, tmp_path: Path) -> None:
    server.signal(signal.SIGKILL)
    tracker = start(tmp_path / "later", server.uri)
    report(tracker, range(2), 5)
    assert tracker.close(1) == 15
    server.start()
    assert upload(tmp_path / "later", server.uri, 60) == (0, [])
    assert is_complete(server.uri, "later", 2, 5)
    assert upload(tmp_path / "later", server.uri, 60, again=True) == (0, [])
    assert is_complete(server.uri, "later", 2, 5)


def test_a_study_that_has_moved_is_sent_to_a_server_or_reports_what_is_missing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    search(tmp_path / "old", 1)
    moved = (tmp_path / "old").rename(tmp_path / "new")
    report, files = moved / "masking" / "report.html", moved / "masking" / "trials" / "1" / "encoder"
    report.rename(tmp_path / "report.html")
    sync = ["sync", "masking", "--storage", str(moved), "--mlflow-uri", server.uri]
    assert main(sync) == 1
    rejected, summary = capsys.readouterr().out.splitlines()
    assert rejected == f"rejected: the study: artifact: {report} no longer exists"
    assert summary.startswith(f"masking is incomplete in {server.uri}")
    (tmp_path / "report.html").rename(report)
    assert main(sync) == 0
    assert files_of(server.uri) == {"masking": ["report.html"], "trial 1": ["epoch.png"]}
    fetched = fetch_encoder("models:/csmae-encoder@champion-masking", server.uri)
    assert (fetched / "encoder.safetensors").read_bytes() == (files / "encoder.safetensors").read_bytes()


@contextlib.contextmanager
def failing(code: int, content: bytes) -> Iterator[str]:
    """A server that answers every request with the same failure."""

    class Fail(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815 - the names are http.server's

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fail) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("code", "content", "message"),
    [
        (500, b'{"error_code": "INTERNAL_ERROR", "message": "disk full"}', "has an internal error"),
        (401, b"who are you?", "rejects this user and password"),
        (403, b"not you", "does not let this user write"),
        (400, b"<html>a proxy</html>", "API request to endpoint /api/2.0/mlflow/experiments/get-by-name failed"),
        (404, b"not here", "API request to endpoint"),
        (200, b"<html>another site</html>", "API request to endpoint was successful but"),
        (429, b"later", "asks for fewer requests"),
    ],
)
def test_a_failing_server_delays_nothing_and_loses_nothing(
    code: int, content: bytes, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with failing(code, content) as uri, caplog.at_level(logging.WARNING):
        tracker = start(tmp_path / "failing", uri)
        longest = report(tracker, range(2), 5)
        assert tracker.close(2) == 15
    assert longest < 0.5
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{uri}: {message}")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert upload(tmp_path / "failing", uri, 60) == (0, [])
    assert is_complete(uri, "failing", 2, 5)


def test_a_server_with_known_security_holes_is_rejected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with failing(200, b"3.9.0") as uri, caplog.at_level(logging.WARNING):
        tracker = start(tmp_path / "old", uri)
        assert tracker.close(2) == 1
    assert "runs MLflow 3.9.0, which has known security holes: update it to 3.11 or later" in caplog.text


def test_a_protected_server_accepts_only_the_right_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("flask_wtf", reason="mlflow's basic-auth app needs flask-wtf")
    settings = tmp_path / "auth.ini"
    settings.write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\nadmin_username = admin\nadmin_password = a-long-password-1\n"
        f"database_uri = sqlite:///{tmp_path}/auth.db\nauthorization_function = "
        "mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    names = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key"}
    with Server(tmp_path, "--app-name", "basic-auth", **names) as protected:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        with caplog.at_level(logging.WARNING):
            tracker = start(tmp_path / "protected", protected.uri)
            report(tracker, range(2), 5)
            assert tracker.close(5) == 15
        assert "rejects this user and password" in caplog.text
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.delenv(name)
        caplog.clear()
        assert upload(tmp_path / "protected", protected.uri, 5) == (15, [])
        assert "rejects this user and password" in caplog.text
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password-1")
        assert upload(tmp_path / "protected", protected.uri, 60) == (0, [])
        assert is_complete(protected.uri, "protected", 2, 5)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """An empty database of a PostgreSQL server that listens on a socket in its own folder."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("needs Debian's postgresql")
    pytest.importorskip("psycopg2", reason="MLflow needs psycopg2 for PostgreSQL")
    as_postgres = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it does not run as root
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        if as_postgres:
            shutil.chown(folder, "postgres")
        made = [*as_postgres, str(binaries[-1] / "initdb"), "-D", f"{folder}/data", "-U", "csmae", "--auth", "trust"]
        subprocess.run(made, check=True, capture_output=True)
        options = ["-D", f"{folder}/data", "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off"]
        quiet = subprocess.DEVNULL
        server = subprocess.Popen([*as_postgres, str(binaries[-1] / "postgres"), *options], stdout=quiet, stderr=quiet)
        try:
            _wait_for(Path(folder) / ".s.PGSQL.5432")
            yield f"postgresql+psycopg2://csmae@/postgres?host={folder}"
        finally:
            pid = int((Path(folder) / "data" / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGINT)
            server.wait(60)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.1)


def test_a_server_on_postgresql_holds_each_trial_and_epoch_once(postgres: str, tmp_path: Path) -> None:
    with Server(tmp_path, "--backend-store-uri", postgres) as server:
        tracker = start(tmp_path / "study", server.uri)
        report(tracker, range(3), 5)
        tracker.champion(2, encoder(tmp_path / "files"), {"val/f1_mean": 2.05}, {"csmae.data": "synthetic"})
        tracker.finish({})
        assert tracker.close(60) == 0
        assert is_complete(server.uri, "study", 3, 5)
        assert upload(tmp_path / "study", server.uri, 60, again=True) == (0, [])
        assert is_complete(server.uri, "study", 3, 5)
        assert fetch_encoder("models:/csmae-encoder@champion", server.uri).is_dir()


def test_a_postgresql_database_works_without_a_tracking_server(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = start(tmp_path / "direct", postgres)
    report(tracker, range(2), 4)
    assert tracker.close(60) == 0
    assert is_complete(postgres, "direct", 2, 4)
