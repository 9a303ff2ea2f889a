"""Creates the role, the firewall and the shared folder that cluster.yaml names, once per AWS account.

Run it with the credentials that `ray up` uses. Run it again to open SSH to another address.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import time
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

NAME = "csmae"
"""Name of the cluster, its security group and its file system, as in cluster.yaml."""

ROLE = "csmae-head"


def main() -> None:
    """Create what is missing and print what cluster.yaml needs."""
    options = parse()
    session = boto3.Session(region_name=options.region)
    try:
        make_role(session)
        vpc = default_vpc(session)
        group = make_firewall(session, vpc, options.ssh_from)
        folder = make_shared_folder(session, vpc, group)
    except (BotoCoreError, ClientError) as error:
        raise SystemExit(f"AWS refused: {error}") from None
    print(f"role {ROLE}, SSH from {options.ssh_from} only; in cluster.yaml write {folder} for MY-FILE-SYSTEM")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ssh-from", required=True, type=ipaddress.IPv4Network, help="addresses that may use SSH")
    parser.add_argument("--region", default="eu-central-1", help="as in cluster.yaml (default: eu-central-1)")
    return parser.parse_args()


def make_role(session: boto3.Session) -> None:
    """Create the head's role, in a profile of the same name: it may start workers, and terminate those of this cluster."""
    iam = session.client("iam")
    trust = allow("sts:AssumeRole") | {"Principal": {"Service": "ec2.amazonaws.com"}}
    own = {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": NAME}}
    spot = "arn:aws:iam::*:role/aws-service-role/spot.amazonaws.com/*"
    rights = [
        allow("ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags") | {"Resource": "*"},
        allow("ec2:TerminateInstances") | {"Resource": "*", "Condition": own},
        allow("iam:CreateServiceLinkedRole") | {"Resource": spot},  # the account's first spot machine needs it
        allow("ssm:GetParameters") | {"Resource": "arn:aws:ssm:*::parameter/aws/service/deeplearning/*"},  # the image
    ]
    try:
        iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument=document(trust))
        iam.create_instance_profile(InstanceProfileName=ROLE)
        iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)
    except iam.exceptions.EntityAlreadyExistsException:
        pass  # created by an earlier run
    iam.put_role_policy(RoleName=ROLE, PolicyName=NAME, PolicyDocument=document(*rights))


def default_vpc(session: boto3.Session) -> str:
    """Find the account's default network; returns its id."""
    found = session.client("ec2").describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not found:
        raise SystemExit(f"{session.region_name} has no default VPC: create one with `aws ec2 create-default-vpc`")
    return str(found[0]["VpcId"])


def make_firewall(session: boto3.Session, vpc: str, ssh_from: ipaddress.IPv4Network) -> str:
    """Create a security group that allows all traffic among the nodes and SSH from one network; returns its id."""
    ec2 = session.client("ec2")
    where = [{"Name": "group-name", "Values": [NAME]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = ec2.describe_security_groups(Filters=where)["SecurityGroups"]
    if found:
        group, rules = found[0]["GroupId"], found[0]["IpPermissions"]
        if rules:
            ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rules)
    else:
        group = ec2.create_security_group(GroupName=NAME, Description="csmae on Ray", VpcId=vpc)["GroupId"]
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": str(ssh_from)}]}
    among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[among, ssh])
    return str(group)


def make_shared_folder(session: boto3.Session, vpc: str, group: str) -> str:
    """Create a file system that the nodes reach from every zone; returns its id. AWS bills what is stored in it."""
    efs, ec2 = session.client("efs"), session.client("ec2")
    tags = [{"Key": "Name", "Value": NAME}]
    try:
        folder = efs.create_file_system(CreationToken=NAME, Encrypted=True, ThroughputMode="elastic", Tags=tags)
        folder_id = folder["FileSystemId"]
    except efs.exceptions.FileSystemAlreadyExists:
        folder_id = efs.describe_file_systems(CreationToken=NAME)["FileSystems"][0]["FileSystemId"]
    while efs.describe_file_systems(FileSystemId=folder_id)["FileSystems"][0]["LifeCycleState"] == "creating":
        time.sleep(2)
    connected = {target["SubnetId"] for target in efs.describe_mount_targets(FileSystemId=folder_id)["MountTargets"]}
    subnets = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
    for subnet in subnets:
        if subnet["DefaultForAz"] and subnet["SubnetId"] not in connected:
            efs.create_mount_target(FileSystemId=folder_id, SubnetId=subnet["SubnetId"], SecurityGroups=[group])
    return str(folder_id)


def allow(*actions: str) -> dict[str, Any]:
    """The start of a policy statement."""
    return {"Effect": "Allow", "Action": list(actions)}


def document(*statements: dict[str, Any]) -> str:
    """A policy with these statements."""
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


if __name__ == "__main__":
    main()
