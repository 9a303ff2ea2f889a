"""`ray up cluster.yaml` against an emulated AWS, up to the commands that would run on the head."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("moto", reason='moto is not installed: pip install -e ".[dev]"')

import boto3
from moto import mock_aws
from ray.autoscaler._private.commands import _bootstrap_config, get_or_create_head_node

ROOT = Path(__file__).parents[2]
REGION = "eu-central-1"
sys.path.insert(0, str(ROOT / "clusters"))
import aws_prepare  # noqa: E402


class Shell:
    """In the place of ssh and rsync: notes each command and says that it went well."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def check_call(self, command: list[str], **_: Any) -> int:
        self.lines.append(" ".join(command))
        return 0


@pytest.fixture(autouse=True)
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An AWS account with nothing in it, a home with a token, and the checkout as the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("token")
    with mock_aws():
        yield


def prepare(monkeypatch: pytest.MonkeyPatch, ssh_from: str = "203.0.113.7/32") -> None:
    monkeypatch.setattr(sys, "argv", ["aws_prepare.py", "--bucket", "csmae-test", "--ssh-from", ssh_from])
    aws_prepare.main()


def ray_up() -> tuple[dict[str, Any], list[str]]:
    shell = Shell()
    config = _bootstrap_config(yaml.safe_load(Path("cluster.yaml").read_text()), no_config_cache=True)
    get_or_create_head_node(config, "cluster.yaml", False, False, True, None, _runner=shell)
    return config, shell.lines


def machines() -> list[dict[str, Any]]:
    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    return [instance for reservation in reservations for instance in reservation["Instances"]]


def test_ray_up_launches_one_head_as_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    config, _ = ray_up()
    (head,) = machines()
    wanted = config["available_node_types"]["head"]["node_config"]
    assert head["InstanceType"] == wanted["InstanceType"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/csmae-head")
    assert head["SecurityGroups"][0]["GroupName"] == "csmae"


def test_ray_finds_the_workers_gpu_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    config, _ = ray_up()
    assert config["available_node_types"]["gpu_worker"]["resources"]["GPU"] == 1
    assert "GPU" not in config["available_node_types"]["head"]["resources"]


def test_the_head_gets_the_token_then_the_package_then_starts_with_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    _, lines = ray_up()

    def position(*words: str) -> int:
        return next(i for i, line in enumerate(lines) if all(word in line for word in words))

    copied, closed = position("rsync", ".ray/auth_token"), position("chmod 600 ~/.ray/auth_token")
    installed, started = position("pip install", "-c constraints.txt ."), position("ray start --head")
    assert copied < closed < installed < started
    assert "RAY_AUTH_MODE=token" in lines[started]


def test_ssh_is_open_to_the_given_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, "198.51.100.0/24")
    prepare(monkeypatch, "203.0.113.7/32")
    ray_up()
    (group,) = boto3.client("ec2").describe_security_groups(GroupNames=["csmae"])["SecurityGroups"]
    from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpRanges"]) for rule in from_outside] == [
        (22, 22, [{"CidrIp": "203.0.113.7/32"}])
    ]


def test_a_worker_may_use_the_bucket_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    policy = boto3.client("iam").get_role_policy(RoleName="csmae-worker", PolicyName="csmae")["PolicyDocument"]
    policy = policy if isinstance(policy, dict) else json.loads(policy)
    assert all("csmae-test" in statement["Resource"] for statement in policy["Statement"])


def test_the_head_may_end_machines_of_its_own_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    policy = boto3.client("iam").get_role_policy(RoleName="csmae-head", PolicyName="csmae")["PolicyDocument"]
    (end,) = [s for s in policy["Statement"] if "ec2:TerminateInstances" in s["Action"]]
    name = yaml.safe_load(Path("cluster.yaml").read_text())["cluster_name"]
    assert end["Condition"] == {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": name}}


def test_the_bucket_is_closed_to_the_public(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
    block = boto3.client("s3").get_public_access_block(Bucket="csmae-test")["PublicAccessBlockConfiguration"]
    assert set(block.values()) == {True}
