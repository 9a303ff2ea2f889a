"""Storage of a search in a bucket, on a real server of S3's protocol that is stopped and started again."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

import csmae
from csmae.config import ConfigError
from csmae.scratch import scratch_root
from csmae.storage import study_mirror
from csmae.storage.layout import DATABASE
from csmae.storage.manifest import RemoteFolder, SupersededError
from csmae.storage.object_store import ObjectStore
from csmae.study.study import load_study
from csmae.trials.budget import Budget
from csmae.trials.database import load_studies
from csmae.trials.store import TrialStore
from csmae.tuning.events import SearchEnd, SearchOutcome
from csmae.tuning.searcher import StudySearcher
from csmae.tuning.stop_controller import StopController
from tests.support.bucket_server import Server, running
from tests.support.searches import ROOT, start, write
from tests.tuning.test_kills import kill_worker


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


def test_a_bucket_of_version_0_1_0_is_rejected_in_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/old")
    ObjectStore(url).put_bytes("driver/manifest.json", b'{"files": {}, "note": {}}')
    monkeypatch.chdir(tmp_path)
    line = r"was written by version 0\.1\.0: name another folder .*\Z"
    with pytest.raises(ConfigError, match=line), study_mirror.driver_storage(url):
        pass
    with pytest.raises(ConfigError, match=line):
        study_mirror.fetch_studies(url)


def test_a_storage_that_is_not_a_folder_or_bucket_or_contains_a_password_is_rejected() -> None:
    with pytest.raises(ConfigError, match="must be a folder, s3://"):
        study_mirror.local_folder("ftp://lab/x")
    for url in ("s3://key:hunter2@lab/x", "s3://lab/x?access_key=key&secret_key=hunter2"):
        with pytest.raises(ConfigError, match="AWS_PROFILE") as caught, study_mirror.driver_storage(url):
            pass
        assert "hunter2" not in str(caught.value)


def test_each_bucket_has_its_own_local_copy() -> None:
    assert (
        study_mirror.local_folder("s3://lab/csmae/")
        == study_mirror.local_folder("s3://lab/csmae?region=x")
        == Path("runs/s3-lab-csmae")
    )
    buckets = ("s3://lab/csmae", "s3://lab-csmae", "s3://lab/cs mae", "s3://lab/cs-mae", "gs://lab/csmae")
    assert len({study_mirror.local_folder(bucket) for bucket in buckets}) == len(buckets)


def test_a_local_copy_is_replaced_by_what_another_machine_wrote_since(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/three")
    outbox = study_mirror.local_folder(url) / "study" / "outbox.jsonl"
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, text in ((here, "1"), (there, "2"), (here, "3")):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        with study_mirror.driver_storage(url):
            assert (outbox.read_text() if outbox.exists() else "") == {"1": "", "2": "1", "3": "12"}[text]
            outbox.parent.mkdir(exist_ok=True)
            with outbox.open("a") as file:
                file.write(text)


def test_two_machines_cannot_run_searches_on_one_storage(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/four")
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with study_mirror.driver_storage(url):
        with pytest.raises(ConfigError, match="is being run by process"), study_mirror.driver_storage(url):
            pass
        monkeypatch.chdir(tmp_path / "there")
        with pytest.raises(ConfigError, match="runs a search on it"), study_mirror.driver_storage(url):
            pass
    with study_mirror.driver_storage(url):
        pass


def test_a_lost_driver_can_be_replaced_after_its_lease(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/five")
    lost = {"copy": "another", "process": "process 1 on elsewhere", "open": True}
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    remote = RemoteFolder(ObjectStore(url), "driver")
    remote.claim().push(tmp_path / "nothing", lost | {"time": time.time() - study_mirror.LEASE_S + 60})
    with (
        pytest.raises(ConfigError, match="process 1 on elsewhere runs a search on it"),
        study_mirror.driver_storage(url),
    ):
        pass
    remote.claim().push(tmp_path / "nothing", lost | {"time": time.time() - study_mirror.LEASE_S})
    with study_mirror.driver_storage(url):
        assert remote.manifest().metadata["copy"] != "another"


def test_a_buckets_studies_can_be_listed_on_any_machine(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, study = server.url("lab/six"), load_study(write(tmp_path))
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with study_mirror.driver_storage(url) as remote:
        assert remote
        TrialStore(study, remote.folder, remote)
    monkeypatch.chdir(tmp_path / "there")
    assert list(load_studies(study_mirror.fetch_studies(url) / DATABASE)) == ["small"]


def append(folder: Path, text: str) -> None:
    """Append to a study's outbox."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "outbox.jsonl").open("a") as file:
        file.write(text)


def test_a_driver_that_was_silent_for_too_long_is_superseded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/taken-over")
    monkeypatch.setattr(study_mirror, "UPLOAD_INTERVAL_S", 0.05)
    for name in ("silent", "successor", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "silent")
    with study_mirror.driver_storage(url) as old:
        assert old
        append(old.folder / "study", "1")
        monkeypatch.setattr(study_mirror, "LEASE_S", -1.0)
        monkeypatch.chdir(tmp_path / "successor")
        with study_mirror.driver_storage(url) as new:
            assert new
            append(new.folder / "study", "2")
            time.sleep(0.3)
            append(old.folder / "study", "lost")
            time.sleep(0.3)
            with pytest.raises(SupersededError, match=f"process {os.getpid()} on .* has taken this storage over"):
                old.claim.check()
            budget = Budget(TrialStore(load_study(write(tmp_path / "silent")), old.folder, old))
            stop_controller = StopController(budget, StudySearcher(budget, lambda event: None, lambda: 1))
            assert stop_controller.stop_all() and stop_controller.search_end == SearchEnd(
                SearchOutcome.SUPERSEDED, old.claim.superseded
            )
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "2" in (study_mirror.fetch_studies(url) / "study" / "outbox.jsonl").read_text()
    assert "lost" not in (study_mirror.fetch_studies(url) / "study" / "outbox.jsonl").read_text()


def wait_for(driver: subprocess.Popen[str], folder: Path, text: str) -> None:
    while text not in (folder / "log").read_text():
        assert driver.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_resumes_on_another_machine_while_the_bucket_is_down_for_a_minute(
    server: Server, tmp_path: Path
) -> None:
    url, here, there = server.url("lab/studies"), tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        write(folder, workers_per_trial=2, strategy="none")
    driver = start(here, "--storage", url)
    wait_for(driver, here, "trial 0 epoch 2/4")
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(120) == 130, (here / "log").read_text()

    driver = start(there, "--storage", url)
    wait_for(driver, there, "trial 0 epoch 3/4")
    with server.gone():
        assert kill_worker(driver, random.Random(0))
        time.sleep(60)
    assert driver.wait(300) == 0, (there / "log").read_text()
    log = (there / "log").read_text()
    assert "trial 0 resumes" in log and "trial 0 epoch 1/4" not in log and "champion: trial" in log

    copy = there / study_mirror.local_folder(url)
    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{copy}/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert all(sorted(trial.intermediate_values) == [1, 2, 3, 4] for trial in trials)
    for trial in trials:
        state = RemoteFolder(ObjectStore(url), f"small/trials/{trial.number}").manifest()
        assert state.metadata["epoch"] == 4 and {"checkpoint.pt", "encoder/config.json"} < set(state.files)
        assert sum(name.startswith("arrays/") for name in state.files) == 3
        assert csmae.load_encoder(copy / "small" / "trials" / str(trial.number) / "encoder").width
    assert (copy / "small" / "report.html").exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "csmae", "report", "small", "--storage", url]
    subprocess.run(command, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert (elsewhere / study_mirror.local_folder(url) / "small" / "report.html").exists()
    assert not list(Path("/tmp").glob("csmae-tune-*/work"))
    assert not list(scratch_root().glob("trial-*"))


SHORT_LEASE = """
import sys
from csmae.storage import study_mirror
study_mirror.UPLOAD_INTERVAL_S, study_mirror.LEASE_S = 1.0, 5.0
from csmae.cli.main import main
sys.exit(main(["search", *sys.argv[1:]]))
"""


def start_with_short_lease(folder: Path, url: str) -> subprocess.Popen[str]:
    """Start a search that presumes a driver dead after five seconds."""
    command = [sys.executable, "-c", SHORT_LEASE, str(folder / "small.yaml"), "--storage", url]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=folder, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_suspended_driver_stops_and_its_successor_keeps_the_trials(server: Server, tmp_path: Path) -> None:
    url, suspended, successor = server.url("lab/suspended"), tmp_path / "suspended", tmp_path / "successor"
    for folder in (suspended, successor):
        folder.mkdir()
        path = write(folder, strategy="none")
        path.write_text(path.read_text().replace("epochs: 4", "epochs: 60"))
    old = start_with_short_lease(suspended, url)
    wait_for(old, suspended, "trial 0 epoch 2/60")
    os.kill(old.pid, signal.SIGSTOP)
    time.sleep(6)
    new = start_with_short_lease(successor, url)
    wait_for(new, successor, "resumes")
    os.kill(old.pid, signal.SIGCONT)
    assert old.wait(120) == 1, (suspended / "log").read_text()
    log = (suspended / "log").read_text()
    assert f"process {new.pid} on" in log and "has taken this storage over: this search stops" in log
    assert "Traceback" not in log
    assert new.wait(400) == 0, (successor / "log").read_text()
    copy = successor / study_mirror.local_folder(url)
    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{copy}/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    for epochs in (sorted(trial.intermediate_values) for trial in trials):
        assert epochs[-1] == 60 and epochs[-50:] == list(range(11, 61))  # some around the stop were in neither database
    assert not list(scratch_root().glob("trial-*"))
