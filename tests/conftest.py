"""Fixtures for several test files: a small archive and a configuration that trains on it in seconds."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from csmae.config import Config
from csmae.settings import merge, parse_config

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

SMALL: dict[str, Any] = {
    "data": {"synthetic": {"num_train": 32, "num_validation": 24, "num_test": 16}},
    "model": {"size": "nano", "patch_size": 30, "sensor_depth": 1, "cross_depth": 1},
    "optim": {"batch_size": 8, "warmup_epochs": 1, "lr": 1e-3},
    "train": {"epochs": 4},
    "eval": {"k": 3, "batch_size": 16},
}
"""Sections of a configuration that trains an epoch in well under a second."""

RAY_FOLDERS = ("cli", "cluster", "tuning", "workers")
"""Folders of tests that start Ray: it needs both cores of a small machine, and finds other Rays that run there."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one process of pytest-xdist run all tests that start Ray, and one process all tests of a file."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:  # the group marks of xdist 3.8 have no effect with pytest 9.2
            file = Path(nodeid.partition("::")[0])
            return "ray" if file.parent.name in RAY_FOLDERS else str(file)

    return Scheduling(config, log)


def free_port() -> int:
    """Find a free port of the loopback interface."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for synthetic archives, instead of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CSMAE_CACHE"] = str(folder)
    return folder


def small_config(**values: Any) -> Config:
    """Make the small configuration with changed fields; two underscores stand for a dot."""
    return parse_config(merge(SMALL, {name.replace("__", "."): value for name, value in values.items()}), "test")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without studies: creating its tables takes longer than most tests."""
    from csmae.storage.layout import DATABASE
    from csmae.trials.database import open_storage

    path = tmp_path_factory.mktemp("studies") / DATABASE
    open_storage(path).engine.dispose()
    return path


@pytest.fixture
def copied_database(empty_database: Path, tmp_path: Path) -> None:
    """Copy an empty database of studies into the test's folder."""
    shutil.copy(empty_database, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
