"""Temporary folders: the next process removes those of killed ones, and never one that is in use."""

import fcntl
import multiprocessing
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from csmae.config import ConfigError, Synthetic
from csmae.data.synthetic.archive import synthesize
from csmae.scratch import hold, scratch, scratch_root
from csmae.tuning.driver import tune_dir


def use_tune_dir(ready: Connection, target: Path) -> None:
    with tune_dir(None) as name:
        ready.send(name)
        time.sleep(60)


def synthesize_slowly(ready: Connection, target: Path) -> None:
    def wait(scenes: int) -> None:
        ready.send(next(target.parent.glob(f".{target.name}-*")))
        time.sleep(60)

    synthesize(SMALLEST, target, wait)


SMALLEST = Synthetic(num_train=1, num_validation=1, num_test=1)


def killed(function: Callable[[Connection, Path], None], target: Path, meanwhile: Callable[[], object]) -> Path:
    """Run a function in a process that is killed; returns the folder that it leaves."""
    (here, there), fork = multiprocessing.Pipe(), multiprocessing.get_context("fork")
    process = fork.Process(target=function, args=(there, target))
    process.start()
    folder = Path(here.recv())
    meanwhile()
    assert folder.exists(), "its process lives"
    process.kill()
    process.join()
    assert folder.exists()
    return folder


def make_tune_dir() -> None:
    with tune_dir(None):
        pass


def test_the_scratch_folder_of_a_killed_driver_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = killed(use_tune_dir, tmp_path, make_tune_dir)
    make_tune_dir()
    assert not left.exists()


def test_half_an_archive_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "archive"
    left = killed(synthesize_slowly, target, lambda: synthesize(SMALLEST, target))
    synthesize(SMALLEST, target)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"] and not left.exists()


def test_a_temporary_folder_of_another_account_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = scratch_root()
    assert root.stat().st_mode & 0o777 == 0o700
    root.rmdir()
    (tmp_path / "trap").mkdir()
    root.symlink_to(tmp_path / "trap")
    with pytest.raises(ConfigError, match="belongs to another account: set TMPDIR"):
        scratch_root()


def flock_of_nfs(lock: int, operation: int) -> None:
    """A flock as the NFS client of Linux does it: by byte-range locks of the open file, which need write access."""
    wait = fcntl.F_OFD_SETLK if operation & fcntl.LOCK_NB else fcntl.F_OFD_SETLKW
    kind = fcntl.F_UNLCK if operation & fcntl.LOCK_UN else fcntl.F_WRLCK
    fcntl.fcntl(lock, wait, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))


@pytest.fixture(params=["local", "nfs"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds of locks that file systems have."""
    if request.param == "nfs":
        monkeypatch.setattr(fcntl, "flock", flock_of_nfs)


def hold_copy(ready: Connection, target: Path) -> None:
    lock = hold(target, lambda: None, 0.0)
    ready.send(target)
    time.sleep(60)
    lock.release()


@pytest.mark.usefixtures("locks")
def test_two_processes_never_hold_the_same_folder(tmp_path: Path) -> None:
    target = tmp_path / "copies" / "rank-0"

    def meanwhile() -> None:
        with pytest.raises(TimeoutError, match="another process uses it"):
            hold(target, lambda: None, 0.0)

    assert killed(hold_copy, target, meanwhile) == target
    hold(target, lambda: None, 0.0).release()


def use_folder(ready: Connection, target: Path) -> None:
    with scratch("tune", target) as folder:
        ready.send(folder)
        time.sleep(60)


@pytest.mark.usefixtures("locks")
def test_only_folders_of_dead_processes_are_removed_and_no_lock_is_left(tmp_path: Path) -> None:
    def meanwhile() -> None:
        with scratch("tune", tmp_path):
            pass

    left = killed(use_folder, tmp_path, meanwhile)
    meanwhile()
    assert not left.exists() and not list(tmp_path.iterdir())


def make_and_remove(ready: Connection, target: Path) -> None:
    """Make and remove folders beside processes that do the same; none is removed while it is used."""
    for _ in range(100):
        with scratch("tune", target) as folder:
            (folder / "file").touch()
            if not (folder / "file").exists():
                ready.send("gone")
                return
    ready.send("fine")


@pytest.mark.usefixtures("locks")
def test_processes_that_make_folders_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    pipes = [multiprocessing.Pipe() for _ in range(3)]
    processes = [fork.Process(target=make_and_remove, args=(there, tmp_path)) for _, there in pipes]
    for process in processes:
        process.start()
    assert [here.recv() for here, _ in pipes] == ["fine"] * 3
    for process in processes:
        process.join()
    assert not list(tmp_path.iterdir())


def test_a_missing_temporary_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nothing"])
    with pytest.raises(ConfigError, match=r"No usable temporary directory found in .*: set TMPDIR to a folder"):
        scratch_root()


def test_a_full_temporary_folder_ends_a_search_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs", str(tmp_path)]  # the root and this account's folder
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(ConfigError, match=f"{tmp_path}/csmae-{os.getuid()}: cannot be written: No space left"):
            make_tune_dir()
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
