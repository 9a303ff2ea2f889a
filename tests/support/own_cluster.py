"""Real Ray clusters on this machine for tests: each node is a `ray start` in its own session."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.conftest import free_port

RAY = str(Path(sys.prefix) / "bin/ray")

TOKEN = "0123456789abcdef" * 4

START_TIMEOUT_S = 90.0

TRAINING_NODES = """
import ray, sys
from ray._private.state import actors
ray.init(sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
workers = [actor for actor in actors().values() if actor["ActorClassName"] == "RayTrainWorker"]
print(*[actor["Address"]["NodeID"] for actor in workers if actor["State"] == "ALIVE"])
"""


class OwnCluster:
    """A head node, and nodes that join it.

    Args:
        folder: Folder of the token and the logs.
        mode: ``token`` or ``disabled``.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        self._stack, self._folder = ExitStack(), folder
        self._scratch = Path(tempfile.mkdtemp(prefix="csmae-ray-"))  # short: it contains sockets
        self._stack.callback(shutil.rmtree, self._scratch, ignore_errors=True)
        self.token = folder / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(TOKEN)
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            "RAY_AUTH_MODE": mode,
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_TMPDIR": str(self._scratch),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._num_nodes = 0

    def start_head(self, num_cpus: int) -> None:
        port = self.address.rpartition(":")[2]
        self.start_node(num_cpus, ["--head", f"--port={port}", "--include-dashboard=false"])

    def add_node(
        self, num_cpus: int, wrapper: Sequence[str] = (), accelerator_type: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a node that joins the cluster; ``wrapper`` precedes its command, such as ``unshare --mount``."""
        kind = [f'--resources={{"accelerator_type:{accelerator_type}": 1}}'] if accelerator_type else []
        return self.start_node(num_cpus, [f"--address={self.address}", *kind], wrapper)

    def start_node(self, num_cpus: int, options: list[str], wrapper: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        self._num_nodes += 1
        log = self._folder / f"node-{self._num_nodes}.log"
        command = [*wrapper, RAY, "start", *options, f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1"]
        command += ["--object-store-memory=80000000", "--block"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=file, stderr=file, start_new_session=True
            )
        self._stack.callback(stop, process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        return process

    def run(self, command: Sequence[str]) -> str:
        """Run a command with the cluster's environment; returns its output."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def nodes_at_work(self) -> list[str]:
        """Ids of the nodes on which trials train."""
        return self.run([sys.executable, "-c", TRAINING_NODES, self.address]).split()

    def close(self) -> None:
        self._stack.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a node's processes, unless they have ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def own_cluster(folder: Path, mode: str = "token", num_cpus: int = 2) -> Iterator[OwnCluster]:
    cluster = OwnCluster(folder, mode)
    try:
        cluster.start_head(num_cpus)
        yield cluster
    finally:
        cluster.close()
