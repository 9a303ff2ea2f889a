"""Reports a cloud's preemption notice for this machine to Ray; runs in a process of its own on each spot machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

from csmae.config import ConfigError

POLL_INTERVAL_S = 5.0

HTTP_TIMEOUT_S = 2.0

GCP_NOTICE_S = 30.0
"""Time from Google's notice to the end of the machine."""

FIRST_RESPONSE_TIMEOUT_S = 30.0
"""Time that the metadata service has for its first response: a machine that has just started may lack a network."""

DRAIN_TIMEOUT_S = 15.0
"""Time that Ray has to accept the notice in one attempt."""


def aws_seconds_left() -> float | None:
    """Seconds until this EC2 instance is stopped or terminated; None as long as there is no notice."""
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    token = _request(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        notice = _request(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None
    end = datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return max(0.0, end.timestamp() - time.time())


def gcp_seconds_left() -> float | None:
    """Seconds until this Compute Engine instance is preempted; None as long as there is no notice."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    return GCP_NOTICE_S if _request(url, {"Metadata-Flavor": "Google"}) == "TRUE" else None


CLOUDS: dict[str, Callable[[], float | None]] = {"aws": aws_seconds_left, "gcp": gcp_seconds_left}


def _request(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
        return str(response.read().decode())


def forward_notice(cloud: str, address: str, node_id: str | None) -> None:
    """Wait for the notice, then drain this node: trials on it save and move, and Ray no longer schedules here.

    Args:
        cloud: ``aws`` or ``gcp``.
        address: Address of the cluster's head, HOST:PORT.
        node_id: Ray's ID of the preempted node; None for this one.

    Raises:
        ConfigError: This is not a machine of that cloud, or Ray does not accept the notice before the machine stops.
    """
    left = _first_response(cloud)
    while left is None:
        time.sleep(POLL_INTERVAL_S)
        try:
            left = CLOUDS[cloud]()
        except (OSError, ValueError, KeyError):  # unreachable, or an incomplete response: the next poll tries again
            continue
    _print(f"this machine stops in {left:.0f} s; notifying Ray")
    _drain(address, node_id, time.monotonic() + left)


def _first_response(cloud: str) -> float | None:
    """Poll the metadata service until it responds for the first time.

    Raises:
        ConfigError: It does not; this is not a machine of the cloud.
    """
    deadline = time.monotonic() + FIRST_RESPONSE_TIMEOUT_S
    while True:
        try:
            return CLOUDS[cloud]()
        except (OSError, ValueError, KeyError) as error:
            refused = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
            if refused or time.monotonic() > deadline:
                raise ConfigError(
                    f"{cloud}: its metadata service does not answer here ({error}): run this on a machine of that cloud"
                ) from None
        time.sleep(1)


def _drain(address: str, node_id: str | None, end: float) -> None:
    """Drain this node, with retries: the head may be busy or unreachable for a moment.

    Args:
        address: Address of the cluster's head.
        node_id: Ray's ID of the node; None for this one.
        end: When the machine stops, on the monotonic clock.

    Raises:
        ConfigError: Ray did not accept the notice before that.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=preemption notice of the cloud"]
    command += [f"--node-id={node_id}"] if node_id else []
    while error := _try_drain([*command, f"--deadline-remaining-seconds={max(0.0, end - time.monotonic()):.0f}"]):
        if time.monotonic() > end:
            raise ConfigError(
                f"Ray at {address} could not be notified: {error}: check with `ray status` that the head runs there, and "
                "that this machine has its token"
            )
        _print(f"Ray did not accept the notice; retrying: {error}")
        time.sleep(1)
    _print("Ray has been notified")


def _try_drain(command: list[str]) -> str | None:
    """Run the command; returns why it failed, None if it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRAIN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {DRAIN_TIMEOUT_S:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]


def _print(text: str) -> None:
    """Print a line immediately. ``typer.echo`` would fail on a full disk, before Ray is notified."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
