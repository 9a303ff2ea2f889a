"""The temporary folder of a local Ray: its own choice, or one with a short name."""

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from csmae.cluster.temp_dir import SOCKET_BYTES, ray_temp_dir


def test_a_default_folder_that_works_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    with ray_temp_dir() as folder:
        assert folder is None


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_sockets_is_replaced_by_a_short_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(tmp_path / ("x" * SOCKET_BYTES)))
    with ray_temp_dir() as folder:
        assert folder and len(folder) < 30 and os.access(folder, os.W_OK)
    assert not Path(folder).exists()


def test_a_folder_that_cannot_be_written_is_replaced() -> None:
    with ray_temp_dir(Path("/proc/nothing")) as folder, ray_temp_dir(Path("/dev/null/ray")) as other:
        assert folder and other and folder != other


def hold_ray_folder(connection: Connection) -> None:
    with ray_temp_dir(Path("/proc/nothing")) as folder:
        connection.send(folder)
        time.sleep(60)


def test_the_next_search_removes_the_folder_of_a_killed_one() -> None:
    (receiver, sender), fork = multiprocessing.Pipe(), multiprocessing.get_context("fork")
    process = fork.Process(target=hold_ray_folder, args=(sender,))
    process.start()
    left = Path(receiver.recv())
    with ray_temp_dir(Path("/proc/nothing")):
        assert left.exists(), "its process is alive"
    process.kill()
    process.join()
    with ray_temp_dir(Path("/proc/nothing")) as folder:
        assert folder and not left.exists()
    assert not Path(folder).exists()
