"""`ray up clusters/local.yaml` on three hosts, a search over them, strangers at the door, and `ray down`.

Not part of the other tests: `make test-cluster`, or `python -m pytest tests/cluster/real_cluster.py` as root.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOSTS = [str(ROOT / "tests/cluster/hosts.sh")]
STATE = Path("/tmp/csmae-hosts")
RAY = str(Path(sys.prefix) / "bin/ray")
HEAD, NUM_HOSTS = "10.78.0.11", 3
ENVIRONMENT = {**os.environ, "HOME": str(STATE / "home"), "CSMAE_HOSTS": str(STATE)}
ENVIRONMENT |= dict.fromkeys(("TMPDIR", "RAY_TMPDIR"), str(STATE / "tmp"))

SEARCH = (
    "cd csmae && python search.py spaces/quickstart.yaml --address auto --storage /shared/csmae "
    "--workers-per-trial 2 --set search.scheduler=none --set data.synthetic.num_train=128"
)

STRANGER = """
import ray, sys
ray.init(sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
print("joined", ray.cluster_resources())
"""


def on_host(host: int, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HOSTS, "run", str(host), command], env=ENVIRONMENT, capture_output=True, text=True)


def no_output(host: int, command: str) -> bool:
    return not on_host(host, command).stdout


def ray(*arguments: str) -> str:
    """Run Ray's command as the user of the launching machine would."""
    command = [RAY, *arguments]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def wait_until(seconds: float, happens: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s still not: {happens}"
        time.sleep(3)


def equip(host: int) -> None:
    """Give a host this virtual environment as its package store: it reaches no package index."""
    offline = "[install]\\nno-build-isolation = false\\nno-index = true\\n"  # pip reads `false` as: no isolation
    venv = f"mkdir -p ~/csmae/.venv && mount --bind {sys.prefix} ~/csmae/.venv"
    done = on_host(host, f"{venv} && printf '{offline}' > /etc/pip.conf && rm -rf ~/.config/pip")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def cluster_file() -> Iterator[str]:
    """Three hosts without a cluster, a token, and clusters/local.yaml with their addresses."""
    if not importlib.util.find_spec("aiohttp_cors"):
        pytest.exit('Ray lacks its dashboard and jobs: pip install -c constraints.txt "ray[default]"', returncode=2)
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
        config["provider"] |= {"head_ip": HEAD, "worker_ips": ["10.78.0.12", "10.78.0.13"]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(STATE / "key")}
        (STATE / "cluster.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        yield str(STATE / "cluster.yaml")
    finally:
        subprocess.run([*HOSTS, "down"], env=ENVIRONMENT, check=True)


@pytest.fixture(scope="module")
def cluster(cluster_file: str) -> Iterator[str]:
    """The cluster that `ray up` makes of them, with all its workers."""
    began = time.monotonic()
    ray("up", "-y", "--no-config-cache", cluster_file)
    head = time.monotonic() - began
    wait_until(240, "three nodes", lambda: "3 local.cluster.node" in ray("exec", cluster_file, "ray status"))
    sys.stderr.write(f"\nhead after {head:.0f} s, workers {time.monotonic() - began - head:.0f} s later\n")
    yield cluster_file
    ray("down", "-y", cluster_file)


def test_a_search_over_the_hosts_ends_with_a_champion_that_loads_elsewhere(cluster: str) -> None:
    output = ray("exec", cluster, f"{SEARCH} --num-trials 2 --set train.epochs=2")
    assert "2 done, 0 pruned, 0 failed" in output
    encoder = STATE / "shared/csmae/quickstart/trials/0/encoder"
    load = f"import csmae, torch; print(csmae.load_encoder({str(encoder)!r}).encode(s1=torch.zeros(1, 2, 120, 120)).s1.shape)"
    done = subprocess.run([sys.executable, "-c", load], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_token_is_closed_to_other_accounts_on_every_host(cluster: str) -> None:
    modes = [on_host(host, "stat -c %a ~/.ray ~/.ray/auth_token").stdout.split() for host in range(1, NUM_HOSTS + 1)]
    assert modes == [["700", "600"]] * NUM_HOSTS


@pytest.mark.parametrize("address", [f"{HEAD}:6379", f"ray://{HEAD}:10001"])
@pytest.mark.parametrize("token", ["RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=guess"])
def test_a_stranger_on_the_network_cannot_join(cluster: str, address: str, token: str) -> None:
    (STATE / "shared/stranger.py").write_text(STRANGER)
    python = "timeout 60 /root/csmae/.venv/bin/python /shared/stranger.py"
    done = on_host(2, f"env HOME=/nowhere {token} {python} {address}")
    assert done.returncode != 0
    assert "joined" not in done.stdout


def test_a_stranger_cannot_submit_a_job_or_see_the_dashboard(cluster: str) -> None:
    dashboard = on_host(2, f"curl -sS -m 5 http://{HEAD}:8265/api/jobs/")
    agent = on_host(2, f"curl -s -m 5 -o /dev/null -w '%{{http_code}}' http://{HEAD}:52365/api/job_agent/jobs/")
    assert dashboard.returncode == 7, "something but a refused connection"
    assert agent.stdout == "401"


def test_the_dashboard_refuses_without_the_token_on_the_head_itself_too(cluster: str) -> None:
    answer = on_host(1, "curl -s -m 5 -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/")
    assert answer.stdout == "401"


def test_a_search_loses_no_trial_when_a_host_is_unplugged(cluster: str) -> None:
    command = [RAY, "exec", cluster, f"{SEARCH} --name lost --num-trials 3 --set train.epochs=20"]
    with (STATE / "lost.log").open("w") as log:
        search = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    trials = STATE / "shared/csmae/lost/trials"
    wait_until(180, "three trials with a checkpoint", lambda: len([*trials.glob("*/encoder/config.json")]) == 3)
    subprocess.run([*HOSTS, "kill", "3"], env=ENVIRONMENT, check=True)
    unplugged = time.monotonic()
    assert search.wait(timeout=420) == 0
    sys.stderr.write(f"\nended {time.monotonic() - unplugged:.0f} s after the host was unplugged\n")
    subprocess.run([*HOSTS, "start", "3"], env=ENVIRONMENT, check=True)
    equip(3)
    assert "3 done, 0 pruned, 0 failed" in (STATE / "lost.log").read_text()


def test_ray_down_leaves_no_process_on_any_host(cluster: str) -> None:
    ray("down", "-y", cluster)
    alive = "ps axo args | grep -E '[r]ay::|[r]aylet|[r]ay/_private|[g]cs_server|[r]ay start' | head -3"
    for host in range(1, NUM_HOSTS + 1):
        wait_until(150, f"host {host} without Ray", partial(no_output, host, alive))
