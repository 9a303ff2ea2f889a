"""`ray up clusters/local.yaml` on three hosts, a search on them, clients without the token, and `ray down`.

Not part of the other tests: `make test-cluster`, or `python -m pytest -s tests/cluster/real_cluster.py` as root.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest

from tests.cluster.lab import HEAD, NUM_HOSTS, ROOT, SEARCH, STORAGE, no_output, on_host, ray, wait_until

pytest_plugins = ["tests.cluster.lab_fixtures"]

CLIENT = """
import ray, sys
ray.init(sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
print("joined", ray.cluster_resources())
"""


def test_a_search_on_the_hosts_ends_with_a_champion_that_loads_elsewhere(cluster: str) -> None:
    output = ray("exec", cluster, f"{SEARCH} --num-trials 2 --set train.epochs=2")
    assert "2 completed, 0 pruned, 0 failed" in output
    encoder = STORAGE / "quickstart/trials/0/encoder"
    load = f"import csmae, torch; print(csmae.load_encoder({str(encoder)!r}).encode(s1=torch.zeros(1, 2, 120, 120)).s1.shape)"
    done = subprocess.run([sys.executable, "-c", load], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_token_is_private_on_every_host(cluster: str) -> None:
    modes = [on_host(host, "stat -c %a ~/.ray ~/.ray/auth_token").stdout.split() for host in range(1, NUM_HOSTS + 1)]
    assert modes == [["700", "600"]] * NUM_HOSTS


@pytest.mark.parametrize("address", [f"{HEAD}:6379", f"ray://{HEAD}:10001"])
@pytest.mark.parametrize("token", ["RAY_AUTH_MODE=disabled", "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=guess"])
def test_a_client_without_the_token_cannot_join(cluster: str, address: str, token: str) -> None:
    (STORAGE.parent / "client.py").write_text(CLIENT)
    python = "timeout 60 /root/csmae/.venv/bin/python /shared/client.py"
    done = on_host(2, f"env HOME=/nowhere {token} {python} {address}")
    assert done.returncode != 0
    assert "joined" not in done.stdout


def test_a_client_without_the_token_cannot_submit_a_job_or_see_the_dashboard(cluster: str) -> None:
    dashboard = on_host(2, f"curl -sS -m 5 http://{HEAD}:8265/api/jobs/")
    agent = on_host(2, f"curl -s -m 5 -o /dev/null -w '%{{http_code}}' http://{HEAD}:52365/api/job_agent/jobs/")
    assert dashboard.returncode == 7, "something other than a refused connection"
    assert agent.stdout == "401"


def test_the_dashboard_requires_the_token_on_the_head_itself(cluster: str) -> None:
    answer = on_host(1, "curl -s -m 5 -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/")
    assert answer.stdout == "401"


@pytest.mark.timeout(1200)
def test_ray_down_leaves_no_process_on_any_host(cluster: str) -> None:
    ray("down", "-y", cluster)
    alive = "ps axo args | grep -E '[r]ay::|[r]aylet|[r]ay/_private|[g]cs_server|[r]ay start' | head -3"
    for host in range(1, NUM_HOSTS + 1):
        wait_until(300, f"host {host} without Ray", partial(no_output, host, alive))
