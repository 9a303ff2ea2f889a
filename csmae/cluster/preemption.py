"""Tells Ray of a cloud's notice that it takes this machine back: ``python -m csmae notice aws --address HEAD:6379``."""

from __future__ import annotations

import argparse
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

LOOK_EVERY_S = 5.0

TIMEOUT_S = 2.0

GOOGLE_S = 30.0
"""Between Google's notice and the end."""

FIRST_S = 30.0
"""In which the metadata service must answer for the first time: a machine that has just started may be without network."""

TRY_S = 15.0
"""For Ray to take the notice, once."""


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``notice``."""
    parser = subparsers.add_parser("notice", help="tell Ray when the cloud takes this (spot) machine back")
    parser.add_argument("cloud", choices=CLOUDS)
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="of the cluster's head")
    parser.add_argument("--node-id", metavar="ID", help="Ray's, of the node that goes (default: this one)")
    parser.set_defaults(run=_watch)


def aws() -> float | None:
    """Seconds until this EC2 instance is stopped or terminated; None while nothing is known of it."""
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    token = _get(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        answer = _get(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None
    end = datetime.strptime(json.loads(answer)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return max(0.0, end.timestamp() - time.time())


def gcp() -> float | None:
    """Seconds until this instance of Compute Engine is preempted; None while nothing is known of it."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    return GOOGLE_S if _get(url, {"Metadata-Flavor": "Google"}) == "TRUE" else None


CLOUDS: dict[str, Callable[[], float | None]] = {"aws": aws, "gcp": gcp}


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def _watch(options: argparse.Namespace) -> int:
    """Wait for the notice and pass it on: trials on this node save and move, and Ray places nothing here any more."""
    seconds_left = CLOUDS[options.cloud]
    left = _first_look(options.cloud)
    while left is None:
        time.sleep(LOOK_EVERY_S)
        try:
            left = seconds_left()
        except (OSError, ValueError, KeyError):  # the service is asked again in a moment, half an answer included
            continue
    _say(f"this machine stops in {left:.0f} s; notifying Ray")
    _tell(options, time.monotonic() + left)
    return 0


def _first_look(cloud: str) -> float | None:
    """See that this is a machine of the cloud.

    Raises:
        ConfigError: Its metadata service does not answer.
    """
    deadline = time.monotonic() + FIRST_S
    while True:
        try:
            return CLOUDS[cloud]()
        except (OSError, ValueError, KeyError) as error:
            refused = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
            if refused or time.monotonic() > deadline:
                raise ConfigError(
                    f"notice {cloud}: its metadata service does not answer here ({error}): run this on a machine of that cloud"
                ) from None
        time.sleep(1)


def _tell(options: argparse.Namespace, end: float) -> None:
    """Tell Ray until it has heard it: its head may be busy or out of reach for a moment.

    Args:
        options: Of the command.
        end: When the machine goes, on the monotonic clock.

    Raises:
        ConfigError: Ray has not heard it before that.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={options.address}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message=notice of {options.cloud}"]
    command += [f"--node-id={options.node_id}"] if options.node_id else []
    while reason := _try([*command, f"--deadline-remaining-seconds={max(0.0, end - time.monotonic()):.0f}"]):
        if time.monotonic() > end:
            raise ConfigError(
                f"notice {options.cloud}: Ray at {options.address} could not be notified: {reason}: check with `ray status` that the "
                "head runs there, and that this machine has its token"
            )
        _say(f"Ray did not accept the notice; retrying: {reason}")
        time.sleep(1)
    _say("Ray has been notified")


def _try(command: list[str]) -> str | None:
    """Why Ray did not take the notice."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {TRY_S:.0f} s"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
