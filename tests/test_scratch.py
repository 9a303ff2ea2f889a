"""Temporary folders: a kill leaves none for long, and nobody's is removed while he lives."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from csmae.config import ConfigError, Synthetic
from csmae.data.synthetic import synthesize
from csmae.scratch import scratch_root
from csmae.tuning import run


def hold_scratch(told: Connection, target: Path) -> None:
    with run._scratch(None) as name:
        told.send(name)
        time.sleep(60)


def synthesize_slowly(told: Connection, target: Path) -> None:
    def say(scenes: int) -> None:
        told.send(next(target.parent.glob(f".{target.name}-*")))
        time.sleep(60)

    synthesize(SMALLEST, target, say)


SMALLEST = Synthetic(num_train=1, num_validation=1, num_test=1)


def killed(what: Callable[[Connection, Path], None], target: Path, meanwhile: Callable[[], object]) -> Path:
    """The folder that a process leaves which is killed at it."""
    (here, there), fork = multiprocessing.Pipe(), multiprocessing.get_context("fork")
    process = fork.Process(target=what, args=(there, target))
    process.start()
    folder = Path(here.recv())
    meanwhile()
    assert folder.exists(), "its process lives"
    process.kill()
    process.join()
    assert folder.exists()
    return folder


def use_scratch() -> None:
    with run._scratch(None):
        pass


def test_the_scratch_folder_of_a_killed_driver_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = killed(hold_scratch, tmp_path, use_scratch)
    use_scratch()
    assert not left.exists()


def test_half_an_archive_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    target = tmp_path / "archive"
    left = killed(synthesize_slowly, target, lambda: synthesize(SMALLEST, target))
    synthesize(SMALLEST, target)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"] and not left.exists()


def test_a_temporary_folder_that_somebody_else_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = scratch_root()
    assert root.stat().st_mode & 0o777 == 0o700
    root.rmdir()
    (tmp_path / "trap").mkdir()
    root.symlink_to(tmp_path / "trap")
    with pytest.raises(ConfigError, match="belongs to another account: set TMPDIR"):
        scratch_root()
