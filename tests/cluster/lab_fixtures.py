"""The hosts and their cluster, started once for all tests of a run."""

from __future__ import annotations

import importlib.util
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.lab import ENVIRONMENT, HEAD, HOSTS, NETWORK, NUM_HOSTS, ROOT, STATE, equip, hosts, ray, wait_for_all


@pytest.fixture(scope="session")
def cluster_file() -> Iterator[str]:
    """Three hosts without a cluster, a token, and clusters/local.yaml with their addresses."""
    if not importlib.util.find_spec("aiohttp_cors"):
        pytest.exit("Ray lacks its dashboard and jobs: run `make test-cluster`, which installs them", returncode=2)
    started = subprocess.run([*HOSTS, "up", str(NUM_HOSTS)], env=ENVIRONMENT, capture_output=True, text=True)
    if started.returncode:
        pytest.exit(started.stderr, returncode=2)
    try:
        for host in range(1, NUM_HOSTS + 1):
            equip(host)
        (STATE / "home/.ray").mkdir()
        (STATE / "tmp").mkdir()
        token = STATE / "home/.ray/auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        config = yaml.safe_load((ROOT / "clusters/local.yaml").read_text())
        config["provider"] |= {
            "head_ip": HEAD,
            "worker_ips": [f"{NETWORK}.{10 + host}" for host in range(2, NUM_HOSTS + 1)],
        }
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(STATE / "key")}
        (STATE / "cluster.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        yield str(STATE / "cluster.yaml")
    finally:
        hosts("down")


@pytest.fixture(scope="session")
def cluster(cluster_file: str) -> Iterator[str]:
    """The cluster that `ray up` starts on them, with all its workers."""
    began = time.monotonic()
    ray("up", "-y", "--no-config-cache", cluster_file)
    head = time.monotonic() - began
    wait_for_all(cluster_file)
    sys.stderr.write(f"\nhead after {head:.0f} s, workers {time.monotonic() - began - head:.0f} s later\n")
    yield cluster_file
    ray("down", "-y", cluster_file)
