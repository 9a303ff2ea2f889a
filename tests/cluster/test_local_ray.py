"""A local Ray starts next to another Ray, with long folder names and with a home folder that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.support.own_cluster import own_cluster
from tests.training.test_ddp import ROOT

START = """
import json, os, ray
from csmae.cluster.resources import ClusterResources
from csmae.cluster.session import ray_running
with ray_running(None, ClusterResources(((1, 0),), "this machine"), verbose=False) as resources:
    read_address = ray.remote(lambda: os.environ.get("RAY_ADDRESS"))
    found = {"cpus": resources.cpus, "address": ray.get_runtime_context().gcs_address, "worker": ray.get(read_address.remote())}
    print(json.dumps(found | {"session": ray._private.worker._global_node.get_session_dir_path()}))
"""


def start(**environment: str) -> str:
    """Start a local Ray in an environment; return what it reports."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", START], env=known | environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_ray_starts_despite_an_address_a_long_folder_name_and_no_home(tmp_path: Path) -> None:
    long = tmp_path / ("job-" + "x" * 100)
    found = start(RAY_ADDRESS=f"127.0.0.1:{free_port()}", TMPDIR=str(long), HOME="/dev/null/home")
    assert '"cpus": 1' in found and '"worker": null' in found
    assert '"session": "/tmp/csmae_ray-' in found and not list(long.rglob("session_*"))


@pytest.mark.slow
def test_another_ray_on_this_machine_is_not_joined(tmp_path: Path) -> None:
    with own_cluster(tmp_path) as other:
        scratch = other.environment["RAY_TMPDIR"]
        assert other.address not in start(RAY_TMPDIR=scratch)
        assert other.address not in start(RAY_ADDRESS=other.address)
        assert '"cpus": 1' in start(RAY_ADDRESS="auto", RAY_TMPDIR=scratch)
