"""Shared by the tests on hosts: three hosts on this machine, Ray's command, and searches on their cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTS = [str(ROOT / "tests/cluster/hosts.sh")]
STATE = Path(os.environ.get("CSMAE_HOSTS", "/tmp/csmae-hosts"))
NETWORK = os.environ.get("CSMAE_NETWORK", "10.78.0")
STORAGE = STATE / "shared/csmae"
RAY = str(Path(sys.prefix) / "bin/ray")
HEAD, NUM_HOSTS = f"{NETWORK}.11", 3
ENVIRONMENT = {**os.environ, "HOME": str(STATE / "home"), "CSMAE_HOSTS": str(STATE)}
ENVIRONMENT |= dict.fromkeys(("TMPDIR", "RAY_TMPDIR"), str(STATE / "tmp"))

SEARCH = (
    "cd csmae && python search.py spaces/quickstart.yaml --address auto --storage /shared/csmae "
    "--workers-per-trial 2 --set search.strategy=none --set data.synthetic.num_train=128"
)


def on_host(host: int, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HOSTS, "run", str(host), command], env=ENVIRONMENT, capture_output=True, text=True)


def hosts(*arguments: str) -> None:
    """Run hosts.sh."""
    subprocess.run([*HOSTS, *arguments], env=ENVIRONMENT, check=True)


def no_output(host: int, command: str) -> bool:
    return not on_host(host, command).stdout


def ray(*arguments: str) -> str:
    """Run Ray's command as a user of the launching machine does."""
    command = [RAY, *arguments]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def wait_until(seconds: float, what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(3)


def equip(host: int) -> None:
    """Mount this virtual environment on a host, which cannot reach a package index."""
    offline = "[install]\\nno-build-isolation = false\\nno-index = true\\n"  # pip reads `false` as "no isolation"
    venv = f"mkdir -p ~/csmae/.venv && mount --bind {sys.prefix} ~/csmae/.venv"
    done = on_host(host, f"{venv} && printf '{offline}' > /etc/pip.conf && rm -rf ~/.config/pip")
    assert done.returncode == 0, done.stderr


def wait_for_all(cluster: str, seconds: float = 240) -> None:
    """Wait until every host is in the cluster."""
    nodes = f"{NUM_HOSTS} local.cluster.node"
    wait_until(seconds, nodes, lambda: nodes in ray("exec", cluster, "ray status"))
