"""Locks on file systems without locks."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from csmae.config import ConfigError
from csmae.lock import describe_write_error, driver_lock
from tests.training.test_ddp import ROOT

WITHOUT_LOCKS = """
import ctypes, struct, sys
from pathlib import Path
from csmae.config import ConfigError
from csmae.lock import database_lock, driver_lock

FLOCK, ENOLCK, ALLOW, FAIL = 73, 37, 0x7FFF0000, 0x00050000
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, FLOCK), (0x06, 0, 0, FAIL | ENOLCK), (0x06, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("@HP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
folder = Path(sys.argv[1])
with database_lock(folder / "studies.db"):
    print("opened")
try:
    with driver_lock(folder / "study"):
        print("locked")
except ConfigError as error:
    print(error)
"""
"""A process in which every flock fails as on Lustre without locks (a seccomp filter, x86-64)."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter has the number of flock on x86-64")
def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    opened, line = done.stdout.splitlines()
    assert opened == "opened"
    assert f"the file system of {tmp_path}/study/driver.lock has no locks (No locks available)" in line
    assert "name a folder on another one or a bucket" in line and "-o flock" in line


def test_a_full_disk_and_a_read_only_folder_have_other_remedies() -> None:
    assert describe_write_error("runs", OSError(28, "No space left on device")).endswith(": free some space there")
    assert describe_write_error("runs", PermissionError(13, "Permission denied")).endswith(
        "that this account may write"
    )


def test_a_second_driver_of_a_study_is_rejected(tmp_path: Path) -> None:
    with driver_lock(tmp_path / "study"), pytest.raises(ConfigError, match=f"by process {os.getpid()}:"):  # noqa: SIM117
        with driver_lock(tmp_path / "study"):
            pass
    with driver_lock(tmp_path / "study"):
        pass
