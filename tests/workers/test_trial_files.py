"""Working copies of trials whose storage is a bucket: uploads, kills, full disks, and workers that were presumed dead."""

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
from csmae.storage.manifest import Manifest, RemoteFolder
from csmae.storage.object_store import ObjectStore
from csmae.training.checkpoint import CheckpointError, FullDiskError, config_fingerprint
from csmae.training.trainer import SYNC_EVERY, StoppedError, pretrain
from csmae.workers.trial_files import PARENT, working_copy
from csmae.workers.working_copies import remove_stale_copies, working_copy_dir
from tests.conftest import small_config
from tests.support.bucket_server import Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


@pytest.fixture
def one_worker() -> Iterator[None]:
    """This process as the only worker of a training."""
    set_train_fn_utils(LocalTrainFnUtils("test"))
    yield
    set_train_fn_utils(None)


def test_a_checkpoint_in_the_middle_of_an_epoch_is_uploaded_and_another_node_resumes_from_it(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    config = small_config(
        data__synthetic__num_train=4 * SYNC_EVERY, optim__batch_size=2, train__epochs=1, optim__warmup_epochs=0
    )
    remote, fingerprint = (
        RemoteFolder(ObjectStore(server.url("lab/halfway")), "study/trials/0"),
        config_fingerprint(config.model_dump()),
    )
    with (
        pytest.raises(StoppedError),
        working_copy(remote, tmp_path / "here", fingerprint, True, bool) as (folder, upload),
    ):
        for _ in pretrain(config, folder, on_step=lambda done, total: True):
            upload()
    steps: list[int] = []
    with working_copy(remote, tmp_path / "there", fingerprint, True, bool) as (folder, upload):
        for _ in pretrain(config, folder, on_step=lambda done, total: steps.append(done)):
            upload()
    assert steps[0] == SYNC_EVERY + 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "both nodes are clear"


def train(
    config: Config, remote: RemoteFolder, node: Path, parent: RemoteFolder | None = None, **options: Any
) -> list[int]:
    """Train on a node, with the files in the bucket; returns the trained epochs."""
    fingerprint = config_fingerprint(config.model_dump())
    with working_copy(remote, node, fingerprint, True, bool, parent) as (folder, upload):
        epochs = []
        for epoch in pretrain(config, folder, parent_dir=folder / PARENT if parent else None, **options):
            upload()
            epochs.append(epoch.number)
        return epochs


def test_a_paused_trial_is_in_the_bucket_when_its_assignment_ends_and_resumes_on_another_node(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    config = small_config(train__checkpoint_every=10, train__epochs=2)
    remote = RemoteFolder(ObjectStore(server.url("lab/paused")), "study/trials/0")
    assert train(config, remote, tmp_path / "here", until=1) == [1]
    assert remote.manifest().metadata["epoch"] == 1
    assert {"checkpoint.pt", "encoder/config.json"} <= remote.manifest().files.keys()
    assert train(config, remote, tmp_path / "there", until=1) == [], "the report was lost"
    assert train(config, remote, tmp_path / "there") == [2]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_copied_checkpoint_is_kept_in_the_bucket_until_the_trial_has_its_own(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    """The worker dies before its first epoch, and the parent's own training continues meanwhile."""
    store, epochs = ObjectStore(server.url("lab/copied")), {"train__epochs": 2}
    parent, child = (RemoteFolder(store, f"study/trials/{number}") for number in (0, 1))
    config = small_config(**epochs, optim__lr=3e-3)
    assert train(small_config(**epochs), parent, tmp_path / "parent", until=1) == [1]
    fingerprint = config_fingerprint(config.model_dump())
    with (
        pytest.raises(RuntimeError),
        working_copy(child, tmp_path / "here", fingerprint, True, bool, parent) as (folder, _),
    ):
        assert (folder / PARENT / "checkpoint.pt").exists()
        raise RuntimeError("an error that ends the group")
    assert train(small_config(**epochs), parent, tmp_path / "parent") == [2]
    assert set(child.manifest().files) == {f"{PARENT}/checkpoint.pt"}
    assert train(config, child, tmp_path / "there", parent) == [2]
    assert child.manifest().metadata["epoch"] == 2
    assert not [path for path in child.manifest().files if path.startswith(PARENT)]


def test_a_copy_without_a_checkpoint_in_the_bucket_fails(server: Server, tmp_path: Path, one_worker: None) -> None:
    parent, child = (RemoteFolder(ObjectStore(server.url("lab/none")), f"study/trials/{number}") for number in (0, 1))
    with pytest.raises(CheckpointError, match="there is no checkpoint to copy"):
        train(small_config(), child, tmp_path / "here", parent)


def test_the_same_node_resumes_from_a_checkpoint_that_was_never_uploaded(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    """A worker is killed in the middle of an epoch: the bucket has an older checkpoint than the node."""
    config = small_config(data__synthetic__num_train=4 * SYNC_EVERY, optim__batch_size=2, train__epochs=3)
    bucket, fingerprint, folder = (
        ObjectStore(server.url("lab/unsent")),
        config_fingerprint(config.model_dump()),
        tmp_path / "trial-rank-0",
    )
    remote = RemoteFolder(bucket, "study/trials/0")
    with pytest.raises(ConfigError), working_copy(remote, folder, fingerprint, True, bool) as (run_dir, upload):
        for _ in pretrain(config, run_dir):
            break
        with pytest.raises(StoppedError):
            list(pretrain(config, run_dir, on_step=lambda done, total: True))
        remote.claim()  # from now on nothing is uploaded
        raise ConfigError("something on this rank")
    remove_stale_copies(tmp_path)
    assert folder.exists()
    steps: list[int] = []
    with working_copy(remote, folder, fingerprint, True, bool) as (run_dir, upload):
        training = pretrain(config, run_dir, on_step=lambda done, total: steps.append(done))
        assert next(training).number == 2
        upload()
    assert steps[0] == SYNC_EVERY + 1 and not folder.exists()
    assert remote.manifest().metadata["epoch"] == 2


def test_the_copy_of_a_dead_worker_is_removed_by_the_next_one_on_the_node(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = (RemoteFolder(ObjectStore(server.url("lab/dead")), f"study/trials/{number}") for number in (0, 1))
    with (
        pytest.raises(RuntimeError),
        working_copy(first, working_copy_dir(first, 0), "fingerprint", True, bool) as (left, upload),
    ):
        (left / "weights").write_text("learnt")
        upload()
        while first.manifest() == Manifest():
            time.sleep(0.01)
        raise RuntimeError("an error that ends the group")
    assert (left / "weights").exists() and left.is_relative_to(tmp_path)
    with working_copy(second, working_copy_dir(second, 0), "fingerprint", True, bool) as (folder, _):
        assert not left.exists()
        remove_stale_copies()
        assert folder.exists(), "it is in use"
    assert not folder.exists()


def test_workers_that_were_presumed_dead_do_not_overwrite_their_successors_files(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    remote = RemoteFolder(ObjectStore(server.url("lab/zombies")), "study/trials/0")
    with pytest.raises(FullDiskError, match="has taken study/trials/0 over"):  # noqa: SIM117
        with working_copy(remote, tmp_path / "old", "fingerprint", True, bool) as (old, upload_old):
            (old / "weights").write_text("first")
            upload_old()
            while not remote.manifest().files:
                time.sleep(0.01)
            with working_copy(remote, tmp_path / "new", "fingerprint", True, bool) as (new, upload_new):
                assert (new / "weights").read_text() == "first"
                (old / "weights").write_text("of the first group")
                upload_old()
                time.sleep(0.2)
                (new / "more").write_text("of its successor")
                upload_new()
    remote.fetch(tmp_path / "found", remote.manifest())
    assert {path.name: path.read_text() for path in (tmp_path / "found").iterdir()} == {
        "weights": "first",
        "more": "of its successor",
    }


def test_a_worker_whose_trial_was_deleted_finishes_without_an_error_and_leaves_nothing(
    server: Server, tmp_path: Path, one_worker: None
) -> None:
    remote = RemoteFolder(ObjectStore(server.url("lab/stopped")), "study/trials/0")
    with working_copy(remote, tmp_path / "copy", "fingerprint", True, bool) as (folder, upload):
        (folder / "weights").write_text("learnt")
        upload()
        while not remote.manifest().files:
            time.sleep(0.01)
        remote.delete()
        (folder / "weights").write_text("learnt for nothing")
        upload()
    assert remote.manifest() == Manifest() and not (tmp_path / "copy").exists()


def test_files_are_uploaded_once_a_full_disk_has_space_again(
    server: Server, small_disk: Path, one_worker: None
) -> None:
    def allow(files: int) -> None:
        subprocess.run(["mount", "-o", f"remount,nr_inodes={files}", str(small_disk)], check=True)

    remote = RemoteFolder(ObjectStore(server.url("lab/full")), "study/trials/0")
    with working_copy(remote, small_disk / "copy", "fingerprint", True, bool) as (folder, upload):
        (folder / "weights").write_text("learnt")
        disk = os.statvfs(small_disk)
        allow(disk.f_files - disk.f_ffree)
        with pytest.raises(OSError, match="No space left"):
            upload()
        allow(1000)
        assert not list(folder.glob(".snapshot-*"))
        upload()
    assert set(remote.manifest().files) == {"weights"}


class OneByOne(LocalTrainFnUtils):  # type: ignore[misc]
    """Two workers of a training; the second starts when the first has ended."""

    data: Any = None

    def broadcast_from_rank_zero(self, data: Any) -> Any:
        self.data = self.data or data
        return self.data


def test_all_ranks_of_a_superseded_group_raise_the_same_error(server: Server, tmp_path: Path) -> None:
    remote = RemoteFolder(ObjectStore(server.url("lab/overtaken")), "study/trials/0")
    remote.store.put_bytes(
        "study/trials/0/claim-99999999-ffffffff", b"process 1 on elsewhere"
    )  # newer than every other claim
    set_train_fn_utils(OneByOne("test"))
    try:
        for rank in (0, 1):
            with (
                pytest.raises(FullDiskError) as caught,
                working_copy(remote, tmp_path / f"rank-{rank}", "fingerprint", rank == 0, bool),
            ):
                pass
            assert str(caught.value) == (
                f"--storage {remote.store.url}: process 1 on elsewhere has taken study/trials/0 over"
            )
    finally:
        set_train_fn_utils(None)
