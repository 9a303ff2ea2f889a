"""`ray up cluster.yaml` against an emulated AWS, including the commands that would run on the head."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

pytest.importorskip("moto", reason='moto is not installed: pip install -e ".[dev]"')

import boto3
from moto import mock_aws
from ray.autoscaler._private.commands import _bootstrap_config, get_or_create_head_node
from ray.autoscaler._private.providers import _get_node_provider

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
EMPTY_ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": CLUSTER["provider"]["region"],
}


@dataclass
class Launch:
    """Replaces ssh and rsync: records each command and reports success."""

    config: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def check_call(self, command: list[str], **_: Any) -> int:
        self.lines.append(" ".join(command))
        return 0

    def position(self, *words: str) -> int:
        return next(i for i, line in enumerate(self.lines) if all(word in line for word in words))


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """An empty account, prepared from two addresses in turn; then `ray up`, then one worker as the head starts it."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("token")
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.chdir(ROOT)
        for name, value in {**EMPTY_ACCOUNT, "HOME": str(home)}.items():
            patch.setenv(name, value)
        for address in ("198.51.100.0/24", "203.0.113.7/32"):
            patch.setattr(sys, "argv", ["aws_prepare.py", "--ssh-from", address])
            runpy.run_path(str(ROOT / "clusters/aws_prepare.py"), run_name="__main__")
        result = Launch(_bootstrap_config(CLUSTER, no_config_cache=True))
        get_or_create_head_node(result.config, "cluster.yaml", False, False, True, None, _runner=result)
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: "gpu_worker"}
        wanted = result.config["available_node_types"]["gpu_worker"]["node_config"]
        _get_node_provider(result.config["provider"], "csmae").create_node(wanted, tags, 1)
        yield result


def machine(node_type: str) -> dict[str, Any]:
    filters = [{"Name": f"tag:{TAG_RAY_USER_NODE_TYPE}", "Values": [node_type]}]
    (reservation,) = boto3.client("ec2").describe_instances(Filters=filters)["Reservations"]
    (instance,) = reservation["Instances"]
    result: dict[str, Any] = instance
    return result


def permissions() -> list[dict[str, Any]]:
    policy = boto3.client("iam").get_role_policy(RoleName="csmae-head", PolicyName="csmae")["PolicyDocument"]
    statements: list[dict[str, Any]] = policy["Statement"]
    return statements


def test_the_head_is_launched_as_in_the_file(launch: Launch) -> None:
    head = machine("head")
    assert head["InstanceType"] == CLUSTER["available_node_types"]["head"]["node_config"]["InstanceType"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/csmae-head")
    assert head["MetadataOptions"]["HttpTokens"] == "required"


def test_a_worker_is_a_spot_machine_without_permissions(launch: Launch) -> None:
    worker = machine("gpu_worker")
    assert worker["InstanceLifecycle"] == "spot"
    assert "IamInstanceProfile" not in worker


def test_ray_detects_that_workers_have_gpus_and_the_head_has_none(launch: Launch) -> None:
    found = {name: node["resources"].get("GPU", 0) for name, node in launch.config["available_node_types"].items()}
    assert found == {"head": 0, "gpu_worker": 1}


def test_the_token_is_copied_and_made_private_before_ray_starts_with_it(launch: Launch) -> None:
    copied, private = launch.position("rsync", ".ray/auth_token"), launch.position("chmod 600 ~/.ray/auth_token")
    installed, started = launch.position("pip install", "-c constraints.txt ."), launch.position("ray start --head")
    assert copied < private < installed < started
    assert "RAY_AUTH_MODE=token" in launch.lines[started]


def test_ssh_is_open_only_to_the_last_address(launch: Launch) -> None:
    (group,) = machine("head")["SecurityGroups"]
    (found,) = boto3.client("ec2").describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    from_outside = [rule for rule in found["IpPermissions"] if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]
    assert from_outside[0]["IpRanges"] == [{"CidrIp": "203.0.113.7/32"}]


def test_the_nodes_reach_each_other_and_the_shared_folder(launch: Launch) -> None:
    groups = {machine(name)["SecurityGroups"][0]["GroupId"] for name in ("head", "gpu_worker")}
    efs = boto3.client("efs")
    (folder,) = efs.describe_file_systems()["FileSystems"]
    zones = {
        target["SubnetId"] for target in efs.describe_mount_targets(FileSystemId=folder["FileSystemId"])["MountTargets"]
    }
    assert len(groups) == 1
    assert machine("head")["SubnetId"] in zones
    assert folder["Encrypted"]


def test_the_head_may_terminate_only_machines_of_its_own_cluster(launch: Launch) -> None:
    (terminate,) = [permission for permission in permissions() if "ec2:TerminateInstances" in permission["Action"]]
    assert terminate["Condition"] == {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": CLUSTER["cluster_name"]}}
    assert not [
        permission for permission in permissions() if any(action.endswith(":*") for action in permission["Action"])
    ]
