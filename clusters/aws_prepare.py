"""Once an AWS account: the bucket, the two roles and the firewall that cluster.yaml names.

Run it with the credentials that `ray up` uses; running it again changes nothing but the address that SSH is open to.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

CLUSTER = "csmae"


def main() -> None:
    """Make what is missing and say what there is."""
    options = parse()
    session = boto3.Session(region_name=options.region)
    try:
        make_bucket(session, options.bucket)
        make_role(session, "csmae-worker", bucket_statements(options.bucket))
        account = session.client("sts").get_caller_identity()["Account"]
        make_role(session, "csmae-head", bucket_statements(options.bucket) + head_statements(account))
        open_ssh(session, options.ssh_from)
    except (BotoCoreError, ClientError) as error:
        raise SystemExit(f"AWS refused: {error}") from None
    print(f"ready: bucket {options.bucket}, roles csmae-head and csmae-worker, SSH from {options.ssh_from} only")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bucket", required=True, help="S3 bucket for checkpoints and encoders; made if missing")
    parser.add_argument("--ssh-from", required=True, type=ipaddress.ip_network, help="addresses that may use SSH")
    parser.add_argument("--region", default="eu-central-1", help="as in cluster.yaml")
    return parser.parse_args()


def make_bucket(session: boto3.Session, bucket: str) -> None:
    """A private bucket in the session's region; S3 encrypts by itself.

    Raises:
        ClientError: The name is taken by somebody else.
    """
    s3 = session.client("s3")
    where = {} if session.region_name == "us-east-1" else {"LocationConstraint": session.region_name}
    try:
        s3.create_bucket(Bucket=bucket, **({"CreateBucketConfiguration": where} if where else {}))
    except s3.exceptions.BucketAlreadyOwnedByYou:
        pass
    closed = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    s3.put_public_access_block(Bucket=bucket, PublicAccessBlockConfiguration=dict.fromkeys(closed, True))


def make_role(session: boto3.Session, name: str, statements: list[dict[str, Any]]) -> None:
    """A role that EC2 machines may take on, with exactly these permissions, in a profile of the same name."""
    iam = session.client("iam")
    trust = [allow("sts:AssumeRole") | {"Principal": {"Service": "ec2.amazonaws.com"}}]
    try:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=document(trust))
    except iam.exceptions.EntityAlreadyExistsException:
        pass
    iam.put_role_policy(RoleName=name, PolicyName=CLUSTER, PolicyDocument=document(statements))
    try:
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    except iam.exceptions.EntityAlreadyExistsException:
        pass


def bucket_statements(bucket: str) -> list[dict[str, Any]]:
    """Read and write one bucket."""
    arn = f"arn:aws:s3:::{bucket}"
    return [
        allow("s3:ListBucket", "s3:GetBucketLocation") | {"Resource": arn},
        allow("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload") | {"Resource": f"{arn}/*"},
    ]


def head_statements(account: str) -> list[dict[str, Any]]:
    """Start workers of this cluster, and end them and no others.

    Args:
        account: The AWS account's number.
    """
    own = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": CLUSTER}}
    spot = "arn:aws:iam::*:role/aws-service-role/spot.amazonaws.com/*"
    return [
        allow("ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags") | {"Resource": "*"},
        allow("ec2:TerminateInstances") | {"Resource": "*", "Condition": own},
        allow("iam:PassRole") | {"Resource": f"arn:aws:iam::{account}:role/csmae-worker"},
        allow("iam:CreateServiceLinkedRole") | {"Resource": spot},  # the account's first spot machine needs it
        allow("ssm:GetParameters") | {"Resource": "arn:aws:ssm:*::parameter/aws/service/deeplearning/*"},
    ]


def open_ssh(session: boto3.Session, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> None:
    """Let in everything among the nodes, and SSH from one network; close SSH to any other.

    Raises:
        ClientError: The account has no default VPC.
    """
    ec2 = session.client("ec2")
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise SystemExit(f"{session.region_name}: no default VPC; make one with `aws ec2 create-default-vpc`")
    found = ec2.describe_security_groups(
        Filters=[{"Name": "group-name", "Values": [CLUSTER]}, {"Name": "vpc-id", "Values": [vpcs[0]["VpcId"]]}]
    )["SecurityGroups"]
    if found:
        group, rules = found[0]["GroupId"], found[0]["IpPermissions"]
    else:
        rules = []
        group = ec2.create_security_group(
            GroupName=CLUSTER, Description="Ray cluster of csmae", VpcId=vpcs[0]["VpcId"]
        )["GroupId"]
    if rules:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rules)
    version = {4: ("IpRanges", "CidrIp"), 6: ("Ipv6Ranges", "CidrIpv6")}[network.version]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, version[0]: [{version[1]: str(network)}]}
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[among, ssh])


def allow(*actions: str) -> dict[str, Any]:
    """The start of a policy statement."""
    return {"Effect": "Allow", "Action": list(actions)}


def document(statements: list[dict[str, Any]]) -> str:
    """A policy of these statements."""
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


if __name__ == "__main__":
    main()
