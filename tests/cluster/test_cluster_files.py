"""Ray accepts the cluster files, and they open nothing to strangers."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = ["cluster.yaml", "clusters/gcp.yaml", "clusters/local.yaml"]
CLOUDS = ["cluster.yaml", "clusters/gcp.yaml"]
STARTS = ["head_start_ray_commands", "worker_start_ray_commands"]
INSTALLS = ["setup_commands", "head_setup_commands", "worker_setup_commands"]


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


def commands(config: dict[str, Any], keys: list[str], word: str) -> list[str]:
    found = [command for key in keys for command in config.get(key, []) if word in command]
    assert found, f"no command with {word!r}"
    return found


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file_as_the_launcher_reads_it(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", FILES)
def test_rays_schema_rejects_a_misspelt_key(name: str) -> None:
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config(load(name) | {"max_workerz": 1}))


@pytest.mark.parametrize("name", FILES)
def test_both_start_commands_require_the_token(name: str) -> None:
    for command in commands(load(name), STARTS, "ray start"):
        assert "RAY_AUTH_MODE=token" in command.split("ray start")[0].split(";")[-1]


@pytest.mark.parametrize("name", FILES)
def test_the_token_is_copied_to_the_node_and_made_private_before_anything_runs(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["setup_commands"][0] == "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token"


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_listens_on_loopback(name: str) -> None:
    for command in commands(load(name), STARTS, "--head"):
        assert "--dashboard-host=127.0.0.1 " in command
        assert "0.0.0.0" not in command


@pytest.mark.parametrize("name", FILES)
def test_only_the_named_parts_of_the_project_are_copied(name: str) -> None:
    mounts = {r: p for r, p in load(name)["file_mounts"].items() if not p.startswith("~")}
    missing = [path for path in mounts.values() if not (ROOT / path).exists()]
    assert missing == []
    assert set(mounts) == {f"~/csmae/{path}" for path in mounts.values()}
    assert "." not in mounts.values()


@pytest.mark.parametrize("name", FILES)
def test_everything_that_the_package_is_built_from_is_copied(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", "constraints.txt", "csmae", project["project"]["readme"]}
    assert needed <= set(load(name)["file_mounts"].values())


@pytest.mark.parametrize("name", FILES)
def test_every_install_uses_the_pinned_versions(name: str) -> None:
    for command in commands(load(name), INSTALLS, "pip install"):
        assert " -c constraints.txt " in command


@pytest.mark.parametrize("name", FILES)
def test_rays_own_install_commands_are_replaced(name: str) -> None:
    prepared = prepare_config(load(name))
    ours = load(name)
    assert prepared["head_setup_commands"] == ours["setup_commands"] + ours.get("head_setup_commands", [])
    assert prepared["worker_setup_commands"] == ours["setup_commands"] + ours.get("worker_setup_commands", [])


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_cluster_starts_without_workers(name: str) -> None:
    config = load(name)
    workers = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    assert sum(worker["min_workers"] for worker in workers.values()) == 0
    assert 0 < max(worker["max_workers"] for worker in workers.values()) <= config["max_workers"]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_has_no_gpu_and_a_worker_is_a_spot_machine(name: str) -> None:
    types = load(name)["available_node_types"]
    market = types["gpu_worker"]["node_config"]
    assert "GPU" not in types["head"]["resources"]
    assert "spot" in str(market.get("InstanceMarketOptions") or market["scheduling"]).lower()


@pytest.mark.parametrize("name", CLOUDS)
def test_a_worker_polls_for_its_clouds_preemption_notice(name: str) -> None:
    config = load(name)
    (command,) = commands(config, STARTS, "preemption-notice")
    words = command[command.index("csmae preemption-notice") :].split()
    assert words[2] == config["provider"]["type"] and "RAY_AUTH_MODE=token" in command
    assert command in config["worker_start_ray_commands"]


def test_the_local_file_selects_the_autoscaler_that_can_start_its_workers() -> None:
    for command in commands(load("clusters/local.yaml"), STARTS, "--head"):
        assert "RAY_enable_autoscaler_v2=0" in command


def test_a_slurm_job_has_its_own_token_that_others_cannot_read() -> None:
    script = (ROOT / "clusters/slurm.sbatch").read_text()
    assert "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in script
    assert "(umask 077 && python -c" in script


def test_the_kubernetes_job_requires_a_token_and_runs_without_privileges() -> None:
    _, job = yaml.safe_load_all((ROOT / "clusters/kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_the_kubernetes_job_names_the_ray_version_of_the_image() -> None:
    _, job = yaml.safe_load_all((ROOT / "clusters/kuberay.yaml").read_text())
    assert f"\nray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_image_contains_what_the_nodes_get_and_does_not_run_as_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    assert copied == {path for path in load("cluster.yaml")["file_mounts"].values() if not path.startswith("~")}
    assert [line for line in lines if line.startswith("USER")][-1] == "USER csmae"
    assert all("-c constraints.txt" in line for line in lines if "pip install" in line)


def test_scripts_pass_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    scripts = [*ROOT.glob("clusters/*.sh"), *ROOT.glob("clusters/*.sbatch"), *ROOT.glob("tests/cluster/*.sh")]
    assert scripts
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_scripts_are_executable() -> None:
    for script in ROOT.glob("tests/cluster/*.sh"):
        assert script.stat().st_mode & stat.S_IXUSR, script
