"""Storage in a bucket: who may write, what a kill leaves behind, and what is done with it."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils

from bucket_server import Server, running
from conftest import small_config
from csmae.config import ConfigError
from csmae.training.checkpoint import FullDiskError
from csmae.training.engine import LOOK_EVERY, StoppedError, pretrain
from csmae.tuning import storage
from csmae.tuning.bucket import Bucket
from csmae.tuning.budget import Budget
from csmae.tuning.events import Ending
from csmae.tuning.file_set import FileSet, Manifest, SupersededError
from csmae.tuning.ledger import Ledger
from csmae.tuning.run import Warden
from csmae.tuning.searcher import LedgerSearcher
from csmae.tuning.study import load_study
from csmae.tuning.working_copy import clear_copies, copy_folder, mark_of, working_copy
from test_search import write


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


@pytest.fixture
def one_worker() -> Iterator[None]:
    """This process as the only worker of a training."""
    set_train_fn_utils(LocalTrainFnUtils("test"))
    yield
    set_train_fn_utils(None)


def test_a_save_in_the_middle_of_an_epoch_reaches_the_bucket_and_the_next_node_goes_on_from_it(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    config = small_config(
        data__synthetic__num_train=4 * LOOK_EVERY, optim__batch_size=2, train__epochs=1, optim__warmup_epochs=0
    )
    files, mark = FileSet(Bucket(server.url("lab/halfway")), "study/trials/0"), mark_of(config.model_dump())
    with pytest.raises(StoppedError), working_copy(files, tmp_path / "here", mark, True, bool) as (folder, mirror):
        for _ in pretrain(config, folder, on_step=lambda done, total: True):
            mirror()
    steps: list[int] = []
    with working_copy(files, tmp_path / "there", mark, True, bool) as (folder, mirror):
        for _ in pretrain(config, folder, on_step=lambda done, total: steps.append(done)):
            mirror()
    assert steps[0] == LOOK_EVERY + 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "both nodes are clear"


def test_a_save_that_the_bucket_never_got_is_gone_on_from_on_the_same_node(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    """A kill in the middle of an epoch: the node has the save, the bucket an older one."""
    config = small_config(data__synthetic__num_train=4 * LOOK_EVERY, optim__batch_size=2, train__epochs=3)
    bucket, mark, folder = Bucket(server.url("lab/unsent")), mark_of(config.model_dump()), tmp_path / "trial-rank-0"
    files = FileSet(bucket, "study/trials/0")
    with pytest.raises(ConfigError), working_copy(files, folder, mark, True, bool) as (run_dir, mirror):
        for _ in pretrain(config, run_dir):
            break
        with pytest.raises(StoppedError):
            list(pretrain(config, run_dir, on_step=lambda done, total: True))
        files.claim()  # as if the bucket had not answered any more
        raise ConfigError("something on this rank")
    clear_copies(tmp_path)
    assert folder.exists()
    steps: list[int] = []
    with working_copy(files, folder, mark, True, bool) as (run_dir, mirror):
        training = pretrain(config, run_dir, on_step=lambda done, total: steps.append(done))
        assert next(training).number == 2
        mirror()
    assert steps[0] == LOOK_EVERY + 1 and not folder.exists()
    assert files.manifest().note["epoch"] == 2


def test_the_copy_of_a_dead_worker_is_removed_by_the_next_one_on_the_node(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = (FileSet(Bucket(server.url("lab/dead")), f"study/trials/{number}") for number in (0, 1))
    with pytest.raises(RuntimeError), working_copy(first, copy_folder(first, 0), "mark", True, bool) as (left, mirror):
        (left / "weights").write_text("learnt")
        mirror()
        while first.manifest() == Manifest():
            time.sleep(0.01)
        raise RuntimeError("what takes a group down")
    assert (left / "weights").exists() and left.is_relative_to(tmp_path)
    with working_copy(second, copy_folder(second, 0), "mark", True, bool) as (folder, _):
        assert not left.exists()
        clear_copies()
        assert folder.exists(), "it is in use"
    assert not folder.exists()


def test_workers_that_were_taken_for_dead_do_not_write_over_those_in_their_place(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    files = FileSet(Bucket(server.url("lab/zombies")), "study/trials/0")
    with pytest.raises(FullDiskError, match="has taken study/trials/0 over"):  # noqa: SIM117
        with working_copy(files, tmp_path / "old", "mark", True, bool) as (old, mirror_old):
            (old / "weights").write_text("first")
            mirror_old()
            while not files.manifest().files:
                time.sleep(0.01)
            with working_copy(files, tmp_path / "new", "mark", True, bool) as (new, mirror_new):
                assert (new / "weights").read_text() == "first"
                (old / "weights").write_text("of the dead")
                mirror_old()
                time.sleep(0.2)
                (new / "more").write_text("of the living")
                mirror_new()
    files.fetch(tmp_path / "found", files.manifest())
    assert {path.name: path.read_text() for path in (tmp_path / "found").iterdir()} == {
        "weights": "first",
        "more": "of the living",
    }


def say(folder: Path, text: str) -> None:
    """Write to an outbox, as the search of a study does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "outbox.jsonl").open("a") as file:
        file.write(text)


def test_a_driver_that_was_silent_too_long_leaves_the_storage_to_its_successor(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("lab/taken-over")
    monkeypatch.setattr(storage, "EVERY_S", 0.05)
    for name in ("silent", "successor", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "silent")
    with storage.opened(url) as old:
        assert old
        say(old.folder / "study", "1")
        monkeypatch.setattr(storage, "LEASE_S", -1.0)
        monkeypatch.chdir(tmp_path / "successor")
        with storage.opened(url) as new:
            assert new
            say(new.folder / "study", "2")
            time.sleep(0.3)
            say(old.folder / "study", "lost")
            time.sleep(0.3)
            with pytest.raises(SupersededError, match=f"process {os.getpid()} on .* has taken this storage over"):
                old.check()
            budget = Budget(Ledger(load_study(write(tmp_path / "silent")), old.folder, old))
            warden = Warden(budget, LedgerSearcher(budget, lambda event: None))
            assert warden.stop_all() and warden.ending == Ending("superseded", old.lost)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "2" in (storage.fetched(url) / "study" / "outbox.jsonl").read_text()
    assert "lost" not in (storage.fetched(url) / "study" / "outbox.jsonl").read_text()


def test_objects_that_a_killed_writer_left_are_removed_a_day_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, bucket = server.url("lab/garbage"), Bucket(server.url("lab/garbage"))
    left = ["driver/studies.db.18b2f3c4d5e6f708", "study/trials/3/checkpoint.pt.18b2f3c4d5e6f708", ".check-0123"]
    (tmp_path / "files" / "encoder").mkdir(parents=True)
    (tmp_path / "files" / "encoder" / "weights").write_text("named")
    FileSet(bucket, "study/trials/4").claim().push(tmp_path / "files", {})
    FileSet(bucket, "study/trials/3").claim()
    for key in (*left, "notes.txt"):
        bucket.put_bytes(key, b"a kill came before the manifest")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "EVERY_S", 0.05)
    for days in (0, 2):
        server.age("lab", "garbage/", days)
        with storage.opened(url):
            time.sleep(0.5)
        assert [key for key in left if bucket.get_bytes(key)] == (left if days == 0 else [])
    assert bucket.get_bytes("notes.txt") and FileSet(bucket, "study/trials/4").manifest().files
    FileSet(bucket, "study/trials/4").fetch(tmp_path / "again", FileSet(bucket, "study/trials/4").manifest())
    assert (tmp_path / "again" / "encoder" / "weights").read_text() == "named"
