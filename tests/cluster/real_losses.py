"""A search on three hosts loses no trial and no epoch when it loses hosts, networks, disks, its driver or its head.

Not part of the other tests: `make test-cluster`, or `python -m pytest -s tests/cluster/real_losses.py` as root. Each prints
how long it took until the trial that lost its workers reported its next epoch.
"""

from __future__ import annotations

import pytest

from tests.cluster.lab import equip, hosts, on_host, ray, wait_for_all
from tests.cluster.watched import WatchedSearch

pytest_plugins = ["tests.cluster.lab_fixtures"]
pytestmark = pytest.mark.timeout(1800)

REJOIN_TIMEOUT_S = 600
"""Time in which a host that runs again must join the cluster: Ray tries now and then."""


def signal_raylet(host: int, name: str) -> int:
    return on_host(host, f"pgrep -f '[r]aylet/raylet ' | xargs -r kill -{name}").returncode


def test_a_worker_host_is_unplugged_and_comes_back(cluster: str) -> None:
    search = WatchedSearch(cluster, "unplugged", num_trials=3)
    search.begun(3)
    hosts("kill", "3")
    search.watch_for(60)
    hosts("start", "3")
    equip(3)
    search.check()
    wait_for_all(cluster, REJOIN_TIMEOUT_S)


def test_a_worker_host_is_cut_off_for_90_seconds(cluster: str) -> None:
    search = WatchedSearch(cluster, "cut-off")
    search.begun()
    host = search.worker_host()
    hosts("cut", str(host))
    search.watch_for(90)
    hosts("join", str(host))
    search.check()
    wait_for_all(cluster, REJOIN_TIMEOUT_S)


def test_the_raylet_of_a_worker_host_is_stopped(cluster: str) -> None:
    search = WatchedSearch(cluster, "raylet-stopped", num_trials=4)
    search.begun(3)
    host = search.worker_host()
    assert signal_raylet(host, "STOP") == 0
    search.check()
    signal_raylet(host, "CONT")
    wait_for_all(cluster, REJOIN_TIMEOUT_S)


def test_the_disk_of_a_worker_host_is_full(cluster: str) -> None:
    search = WatchedSearch(cluster, "disk-full")
    search.begun()
    host = search.worker_host()
    fill = "fallocate -l $(df --output=avail -B1 / | tail -1) /full; head -c 8M /dev/zero > /more"
    assert "No space left" in on_host(host, fill).stderr
    search.check()
    on_host(host, "rm /full /more")
    wait_for_all(cluster, REJOIN_TIMEOUT_S)


def test_the_driver_is_killed_and_started_again(cluster: str) -> None:
    search = WatchedSearch(cluster, "driver-killed")
    search.begun()
    assert on_host(1, "pgrep -f '^python search[.]py' | xargs kill -KILL").returncode == 0
    assert search.ended(60) != 0
    search.start()
    search.check()


def test_the_head_is_lost_and_started_again(cluster: str) -> None:
    search = WatchedSearch(cluster, "head-lost")
    search.begun()
    hosts("kill", "1")
    assert search.ended(120) != 0
    hosts("start", "1")
    equip(1)
    ray("up", "-y", "--no-config-cache", cluster)
    search.start()
    search.check()
    wait_for_all(cluster, REJOIN_TIMEOUT_S)
