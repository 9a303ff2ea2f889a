"""Storage in a bucket: a real server of S3's protocol, which goes away and comes back."""

import json
import os
import random
import shutil
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
from csmae.storage import study_mirror as storage
from csmae.storage.layout import DATABASE
from csmae.storage.manifest import Manifest, RemoteFolder
from csmae.storage.object_store import ObjectStore
from csmae.study.study import load_study
from csmae.trials.store import TrialStore
from csmae.trials.transfer import study_names
from tests.conftest import free_port
from tests.support.bucket_server import Server, running
from tests.support.searches import start, write
from tests.tuning.test_kills import kill_worker


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


def write_files(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_state_of_files_comes_back_as_it_was_whatever_is_pushed_meanwhile(server: Server, tmp_path: Path) -> None:
    files, here = (
        RemoteFolder(ObjectStore(server.url("lab/one")), "trial"),
        write_files(tmp_path / "a", model="1", encoder__x="1"),
    )
    assert files.manifest() == Manifest()
    claim = files.claim()
    first = claim.push(here, {"epoch": 1})
    write_files(here, model="22")
    second = claim.push(here, {"epoch": 2})
    assert first.files["encoder/x"] == second.files["encoder/x"] and first.files["model"] != second.files["model"]
    files.fetch(tmp_path / "b", files.manifest())
    assert contents(tmp_path / "b") == {"model": "22", "encoder/x": "1"}
    with pytest.raises(FileNotFoundError):
        files.fetch(tmp_path / "c", first)
    files.delete()
    assert ObjectStore(server.url("lab/one")).names("trial/encoder") == [] and files.manifest() == Manifest()


def test_a_manifest_that_names_files_elsewhere_is_refused(server: Server, tmp_path: Path) -> None:
    bucket = ObjectStore(server.url("lab/two"))
    for name in ("../../escape", "/tmp/escape"):
        bucket.put_bytes("trial/manifest.json", json.dumps({"files": {name: "x.1"}, "note": {}}).encode())
        with pytest.raises(ConfigError, match="a file elsewhere"):
            RemoteFolder(bucket, "trial").manifest()
    bucket.put_bytes("trial/manifest.json", b"[]")
    with pytest.raises(ConfigError, match="is damaged"):
        RemoteFolder(bucket, "trial").manifest()


def test_a_bucket_that_cannot_be_used_is_told_in_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        server.url("absent/x"): "there is no such bucket",
        f"s3://lab/x?endpoint_override=127.0.0.1:{free_port()}&scheme=http": "does not answer",
        "s3://lab/x?endpoint=1": "endpoint",
    }
    for url, text in wrong.items():
        with pytest.raises(ConfigError, match=text) as caught:
            ObjectStore(url).check()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="must be a folder, s3://"):
        storage.local("ftp://lab/x")
    for url in ("s3://key:hunter2@lab/x", "s3://lab/x?access_key=key&secret_key=hunter2"):
        with pytest.raises(ConfigError, match="AWS_PROFILE") as caught, storage.opened(url):
            pass
        assert "hunter2" not in str(caught.value)


def test_each_bucket_has_a_copy_of_its_own() -> None:
    assert storage.local("s3://lab/csmae/") == storage.local("s3://lab/csmae?region=x") == Path("runs/s3-lab-csmae")
    buckets = ("s3://lab/csmae", "s3://lab-csmae", "s3://lab/cs mae", "s3://lab/cs-mae", "gs://lab/csmae")
    assert len({storage.local(bucket) for bucket in buckets}) == len(buckets)


def test_the_copy_of_a_bucket_that_version_0_1_0_made_is_renamed_where_it_is_that_buckets(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, other, old = server.url("lab/old-name"), server.url("lab/old/name"), Path("runs/s3-lab-old-name")
    monkeypatch.chdir(tmp_path)
    with storage.opened(url) as files:
        assert files
        write_files(files.folder, study__outbox="sent")
        (files.folder / DATABASE).touch()
    storage.local(url).rename(old)
    write_files(old, study__outbox="sent, and waiting")
    assert (storage.fetched(url) / "study" / "outbox").read_text() == "sent, and waiting"
    with storage.opened(url) as files:
        assert files and (files.folder / "study" / "outbox").read_text() == "sent, and waiting"
    assert files.folder == storage.local(url).absolute() and not old.exists()

    shutil.rmtree(storage.local(url))
    with storage.opened(other) as files:
        assert files and files.folder == old.absolute()
        write_files(files.folder, study__outbox="of another bucket")
    with storage.opened(url) as files:
        assert files and (files.folder / "study" / "outbox").read_text() == "sent, and waiting"
    assert (old / "study" / "outbox").read_text() == "of another bucket"


def test_a_copy_gives_way_to_what_another_machine_wrote_since(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, outbox = server.url("lab/three"), Path(storage.local(server.url("lab/three"))) / "study" / "outbox.jsonl"
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, text in ((here, "1"), (there, "2"), (here, "3")):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        with storage.opened(url):
            assert (outbox.read_text() if outbox.exists() else "") == {"1": "", "2": "1", "3": "12"}[text]
            outbox.parent.mkdir(exist_ok=True)
            with outbox.open("a") as file:
                file.write(text)


def test_two_machines_do_not_drive_one_storage_at_a_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/four")
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with storage.opened(url):
        with pytest.raises(ConfigError, match="is being run by process"), storage.opened(url):
            pass
        monkeypatch.chdir(tmp_path / "there")
        with pytest.raises(ConfigError, match="runs a search on it"), storage.opened(url):
            pass
    with storage.opened(url):
        pass


def test_a_driver_that_is_lost_gives_way_after_a_while(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/five")
    lost = {"owner": "another", "who": "process 1 on elsewhere", "open": True}
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    files = RemoteFolder(ObjectStore(url), "driver")
    files.claim().push(tmp_path / "nothing", lost | {"time": time.time() - storage.LEASE_S + 60})
    with pytest.raises(ConfigError, match="process 1 on elsewhere runs a search on it"), storage.opened(url):
        pass
    files.claim().push(tmp_path / "nothing", lost | {"time": time.time() - storage.LEASE_S})
    with storage.opened(url):
        assert files.manifest().note["owner"] != "another"


def test_the_studies_of_a_bucket_are_listed_anywhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, study = server.url("lab/six"), load_study(write(tmp_path))
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with storage.opened(url) as files:
        assert files
        TrialStore(study, files.folder, files)
    monkeypatch.chdir(tmp_path / "there")
    assert study_names(storage.fetched(url) / DATABASE) == ["small"]


def wait_for(driver: subprocess.Popen[str], folder: Path, text: str) -> None:
    while text not in (folder / "log").read_text():
        assert driver.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_goes_on_elsewhere_from_a_bucket_that_is_gone_for_a_while(server: Server, tmp_path: Path) -> None:
    url, here, there = server.url("lab/studies"), tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        write(folder, workers_per_trial=2, scheduler="none")
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

    copy = there / storage.local(url)
    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{copy}/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert all(sorted(trial.intermediate_values) == [1, 2, 3, 4] for trial in trials)
    for trial in trials:
        state = RemoteFolder(ObjectStore(url), f"small/trials/{trial.number}").manifest()
        assert state.note["epoch"] == 4 and {"checkpoint.pt", "encoder/config.json"} < set(state.files)
        assert sum(name.startswith("arrays/") for name in state.files) == 3
        assert csmae.load_encoder(copy / "small" / "trials" / str(trial.number) / "encoder").width
    assert (copy / "small" / "report.html").exists()
    assert not list(Path("/tmp").glob("csmae-tune-*/work"))
    assert not list(scratch_root().glob("trial-*"))


IMPATIENT = """
import sys
from csmae.storage import study_mirror as storage
storage.EVERY_S, storage.LEASE_S = 1.0, 5.0
from csmae.cli.main import main
sys.exit(main(["search", *sys.argv[1:]]))
"""


def start_impatient(folder: Path, url: str) -> subprocess.Popen[str]:
    """A search that takes a driver for dead after five seconds."""
    command = [sys.executable, "-c", IMPATIENT, str(folder / "small.yaml"), "--storage", url]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=folder, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_that_stood_still_ends_and_its_successor_keeps_the_trials(server: Server, tmp_path: Path) -> None:
    url, still, successor = server.url("lab/stood-still"), tmp_path / "still", tmp_path / "successor"
    for folder in (still, successor):
        folder.mkdir()
        path = write(folder, scheduler="none")
        path.write_text(path.read_text().replace("epochs: 4", "epochs: 60"))
    old = start_impatient(still, url)
    wait_for(old, still, "trial 0 epoch 2/60")
    os.kill(old.pid, signal.SIGSTOP)
    time.sleep(6)
    new = start_impatient(successor, url)
    wait_for(new, successor, "resumes")
    os.kill(old.pid, signal.SIGCONT)
    assert old.wait(120) == 1, (still / "log").read_text()
    log = (still / "log").read_text()
    assert f"process {new.pid} on" in log and "has taken this storage over: this search stops" in log
    assert "Traceback" not in log
    assert new.wait(400) == 0, (successor / "log").read_text()
    copy = successor / storage.local(url)
    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{copy}/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    for epochs in (sorted(trial.intermediate_values) for trial in trials):
        assert epochs[-1] == 60 and epochs[-50:] == list(range(11, 61))  # some around the stop were in neither database
    assert not list(scratch_root().glob("trial-*"))
