"""Storage in a bucket: who may write, what a kill leaves behind, and what is done with it."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils

from csmae.config import Config, ConfigError
from csmae.storage import study_mirror as storage
from csmae.storage.manifest import Manifest, RemoteFolder, SupersededError
from csmae.storage.object_store import ObjectStore
from csmae.study.study import load_study
from csmae.training.checkpoint import FullDiskError
from csmae.training.trainer import LOOK_EVERY, StoppedError, pretrain
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.events import SearchEnd, SearchOutcome
from csmae.tuning.searcher import StudySearcher
from csmae.tuning.stop_controller import StopController
from csmae.workers.trial_files import clear_copies, copy_folder, marks_of, working_copy
from tests.conftest import small_config
from tests.support.bucket_server import Server, running
from tests.support.searches import write


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
    files, marks = RemoteFolder(ObjectStore(server.url("lab/halfway")), "study/trials/0"), marks_of(config.model_dump())
    with pytest.raises(StoppedError), working_copy(files, tmp_path / "here", marks, True, bool) as (folder, mirror):
        for _ in pretrain(config, folder, on_step=lambda done, total: True):
            mirror()
    steps: list[int] = []
    with working_copy(files, tmp_path / "there", marks, True, bool) as (folder, mirror):
        for _ in pretrain(config, folder, on_step=lambda done, total: steps.append(done)):
            mirror()
    assert steps[0] == LOOK_EVERY + 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "both nodes are clear"


def test_a_save_that_the_bucket_never_got_is_gone_on_from_on_the_same_node(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    """A kill in the middle of an epoch: the node has the save, the bucket an older one."""
    config = small_config(data__synthetic__num_train=4 * LOOK_EVERY, optim__batch_size=2, train__epochs=3)
    bucket, marks, folder = (
        ObjectStore(server.url("lab/unsent")),
        marks_of(config.model_dump()),
        tmp_path / "trial-rank-0",
    )
    files = RemoteFolder(bucket, "study/trials/0")
    with pytest.raises(ConfigError), working_copy(files, folder, marks, True, bool) as (run_dir, mirror):
        for _ in pretrain(config, run_dir):
            break
        with pytest.raises(StoppedError):
            list(pretrain(config, run_dir, on_step=lambda done, total: True))
        files.claim()  # as if the bucket had not answered any more
        raise ConfigError("something on this rank")
    clear_copies(tmp_path)
    assert folder.exists()
    steps: list[int] = []
    with working_copy(files, folder, marks, True, bool) as (run_dir, mirror):
        training = pretrain(config, run_dir, on_step=lambda done, total: steps.append(done))
        assert next(training).number == 2
        mirror()
    assert steps[0] == LOOK_EVERY + 1 and not folder.exists()
    assert files.manifest().note["epoch"] == 2


def test_the_copy_of_a_dead_worker_is_removed_by_the_next_one_on_the_node(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = (RemoteFolder(ObjectStore(server.url("lab/dead")), f"study/trials/{number}") for number in (0, 1))
    with (
        pytest.raises(RuntimeError),
        working_copy(first, copy_folder(first, 0), ("mark",), True, bool) as (left, mirror),
    ):
        (left / "weights").write_text("learnt")
        mirror()
        while first.manifest() == Manifest():
            time.sleep(0.01)
        raise RuntimeError("what takes a group down")
    assert (left / "weights").exists() and left.is_relative_to(tmp_path)
    with working_copy(second, copy_folder(second, 0), ("mark",), True, bool) as (folder, _):
        assert not left.exists()
        clear_copies()
        assert folder.exists(), "it is in use"
    assert not folder.exists()


def test_workers_that_were_taken_for_dead_do_not_write_over_those_in_their_place(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    files = RemoteFolder(ObjectStore(server.url("lab/zombies")), "study/trials/0")
    with pytest.raises(FullDiskError, match="has taken study/trials/0 over"):  # noqa: SIM117
        with working_copy(files, tmp_path / "old", ("mark",), True, bool) as (old, mirror_old):
            (old / "weights").write_text("first")
            mirror_old()
            while not files.manifest().files:
                time.sleep(0.01)
            with working_copy(files, tmp_path / "new", ("mark",), True, bool) as (new, mirror_new):
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
            budget = Budget(TrialStore(load_study(write(tmp_path / "silent")), old.folder, old))
            stop_controller = StopController(budget, StudySearcher(budget, lambda event: None))
            assert stop_controller.stop_all() and stop_controller.search_end == SearchEnd(
                SearchOutcome.SUPERSEDED, old.lost
            )
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "2" in (storage.fetched(url) / "study" / "outbox.jsonl").read_text()
    assert "lost" not in (storage.fetched(url) / "study" / "outbox.jsonl").read_text()


def test_a_writer_whose_files_were_deleted_writes_nothing_more(server: Server, tmp_path: Path) -> None:
    bucket, here = ObjectStore(server.url("lab/deleted")), tmp_path / "here"
    files = RemoteFolder(bucket, "study/trials/0")
    here.mkdir()
    (here / "weights").write_text("of the dead")
    old = files.claim()
    state = old.push(here, {"epoch": 1})
    files.delete()
    with pytest.raises(SupersededError, match="study/trials/0 was deleted"):
        old.push(here, {"epoch": 2})
    assert files.manifest() == Manifest() and not bucket.names(files.key)
    bucket.put_bytes(f"{files.key}/manifest-{old.token}.json", json.dumps(vars(state)).encode())  # it was on its way
    assert files.manifest() == Manifest()
    new = files.claim()
    (here / "weights").write_text("of the living")
    new.push(here, {"epoch": 3})
    assert files.manifest().note == {"epoch": 3}


def test_a_worker_whose_trial_was_deleted_ends_quietly_and_leaves_nothing(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    files = RemoteFolder(ObjectStore(server.url("lab/stopped")), "study/trials/0")
    with working_copy(files, tmp_path / "copy", ("mark",), True, bool) as (folder, mirror):
        (folder / "weights").write_text("learnt")
        mirror()
        while not files.manifest().files:
            time.sleep(0.01)
        files.delete()
        (folder / "weights").write_text("learnt for nothing")
        mirror()
    assert files.manifest() == Manifest() and not (tmp_path / "copy").exists()


def test_a_state_that_a_full_disk_kept_back_is_sent_when_there_is_room_again(
    server: Server, small_disk: Path, one_worker: None
) -> None:
    def allow(files: int) -> None:
        subprocess.run(["mount", "-o", f"remount,nr_inodes={files}", str(small_disk)], check=True)

    files = RemoteFolder(ObjectStore(server.url("lab/full")), "study/trials/0")
    with working_copy(files, small_disk / "copy", ("mark",), True, bool) as (folder, mirror):
        (folder / "weights").write_text("learnt")
        disk = os.statvfs(small_disk)
        allow(disk.f_files - disk.f_ffree)
        with pytest.raises(OSError, match="No space left"):
            mirror()
        allow(1000)
        assert not list(folder.glob(".state-*"))
        mirror()
    assert set(files.manifest().files) == {"weights"}


def test_a_checkpoint_of_version_0_1_0_is_resumed(server: Server, tmp_path: Path, one_worker: None) -> None:
    bucket, mark = ObjectStore(server.url("lab/old")), "98bfbbbb"  # which 0.1.0 wrote for the default configuration
    state = {"files": {"checkpoint": "checkpoint.18b2f3c4d5e6f708"}, "note": {"mark": mark, "epoch": 1}}
    bucket.put_bytes("study/trials/0/checkpoint.18b2f3c4d5e6f708", b"learnt")
    bucket.put_bytes("study/trials/0/manifest.json", json.dumps(state).encode())
    files, marks = RemoteFolder(bucket, "study/trials/0"), marks_of(Config().model_dump())
    with working_copy(files, tmp_path / "copy", marks, True, bool) as (folder, mirror):
        assert (folder / "checkpoint").read_text() == "learnt"
        (folder / "encoder").write_text("new")
        mirror()
    assert set(files.manifest().files) == {"checkpoint", "encoder"} and files.manifest().note["mark"] == marks[0]


class OneByOne(LocalTrainFnUtils):  # type: ignore[misc]
    """Two workers of a training, the second of which begins when the first is done."""

    said: Any = None

    def broadcast_from_rank_zero(self, data: Any) -> Any:
        self.said = self.said or data
        return self.said


def test_all_ranks_of_a_group_that_was_overtaken_say_the_same_line(server: Server, tmp_path: Path) -> None:
    files = RemoteFolder(ObjectStore(server.url("lab/overtaken")), "study/trials/0")
    files.bucket.put_bytes(
        "study/trials/0/claim-99999999-ffffffff", b"process 1 on elsewhere"
    )  # every claim comes before
    set_train_fn_utils(OneByOne("test"))
    try:
        for rank in (0, 1):
            with (
                pytest.raises(FullDiskError) as caught,
                working_copy(files, tmp_path / f"rank-{rank}", ("mark",), rank == 0, bool),
            ):
                pass
            assert str(caught.value) == (
                f"--storage {files.bucket.url}: process 1 on elsewhere has taken study/trials/0 over"
            )
    finally:
        set_train_fn_utils(None)
