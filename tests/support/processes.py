"""Processes of their own for tests, which do not begin with seconds of imports.

They come from a fork server, which imported torch and the program once and did nothing else: no threads, no backward pass.
"""

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import start_processes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["csmae.training.trainer", "csmae.cli.main", "csmae.tracking.tracker"])


def run_ranks(work: Callable[..., None], *arguments: Any, num_ranks: int = 2) -> None:
    """Call a function with a rank and the arguments in so many processes; what one raises is raised here."""
    start_processes(work, arguments, num_ranks, start_method="forkserver")


class PythonProcess:
    """Python code that runs in a separate process, like ``python -c``.

    Args:
        code: The program.
        arguments: The program's ``sys.argv``.
        environment: Variables in addition to this process's.
        file_bytes: Largest size of a file that the process writes; -1 for no limit.
    """

    def __init__(self, code: str, *arguments: object, environment: Mapping[str, str], file_bytes: int = -1) -> None:
        self._files = tuple(Path(tempfile.mkstemp(prefix="csmae-test-")[1]) for _ in range(2))
        self.arguments = [str(argument) for argument in arguments]
        self._process = SERVER.Process(
            target=_run, args=(code, self.arguments, os.environ | environment, self._files, file_bytes)
        )
        self._process.start()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit status; None where it still runs after the time."""
        self._process.join(timeout_s)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self.done()

    def done(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end; what was printed."""
        status = self.wait()
        assert status is not None
        out, err = (path.read_text() for path in self._files)
        for path in self._files:
            path.unlink()
        return subprocess.CompletedProcess(self.arguments, status, out, err)


def run_code(
    code: str, *arguments: object, environment: Mapping[str, str] | None = None, file_bytes: int = -1
) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end; arguments as of ``PythonProcess``."""
    return PythonProcess(code, *arguments, environment=environment or {}, file_bytes=file_bytes).done()


def _run(
    code: str, arguments: list[str], environment: dict[str, str], files: tuple[Path, ...], file_bytes: int
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["-c", *arguments]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
