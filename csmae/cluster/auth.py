"""Authentication with a Ray cluster: its GCS address, whether it requires a token, and whether it accepts ours."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from csmae.atomic import atomic_write
from csmae.cluster.ray_private import (
    AUTHENTICATION_PROBE,
    REJECTED,
    enable_token_authentication,
    has_token,
    reload_token,
    resolve_address,
)
from csmae.config import ConfigError, one_line

CONNECT_TIMEOUT_S = 10.0

PROBE_TIMEOUT_S = 40.0
"""Longer than the half minute that Ray takes to report a rejection."""


def gcs_address(address: str) -> str:
    """Find the address of the cluster's GCS, and check that something listens there.

    Args:
        address: ``auto``, which is ``RAY_ADDRESS`` or a Ray that runs on this machine, or ``host:port``.

    Returns:
        ``host:port``.

    Raises:
        ConfigError: Nothing listens there.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: a search runs on a node of its cluster: log in there and use --address auto"
        )
    try:
        found = resolve_address(address)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--address {address}: no Ray there: {one_line(error)}: name HOST:PORT of its head, or start it (`ray start --head`)"
        ) from None
    if found is None:
        raise ConfigError(f"--address {address}: names no cluster: leave it out to search on this machine alone")
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"--address {address}: nothing answers at {found}: {error.strerror or error}: does Ray run there "
            "(`ray status`), on that port?"
        ) from None
    return found


def authenticate(gcs: str, insecure: bool) -> bool:
    """Check that a cluster requires a token and accepts this account's, and have Ray send it.

    Args:
        gcs: Address of the cluster's GCS.
        insecure: Whether a cluster that requires no token is accepted.

    Returns:
        Whether the cluster requires a token.

    Raises:
        ConfigError: The cluster requires no token or rejects ours, or it is not a Ray cluster.
    """
    if _accepts(gcs, "disabled"):
        if not insecure:
            raise ConfigError(
                f"the cluster at {gcs} requires no token: whoever reaches it can run programs on it: start "
                "it with RAY_AUTH_MODE=token (docs/explanation/security.md), or accept that with --insecure"
            )
        return False
    if not _accepts(gcs, "token"):
        raise ConfigError(
            f"the cluster at {gcs} does not accept the token of this account: copy ~/.ray/auth_token of its head, "
            "readable by this account only (chmod 600), or name it in RAY_AUTH_TOKEN_PATH"
        )
    os.environ.pop("RAY_AUTH_MODE", None)
    enable_token_authentication()
    return True


def _accepts(gcs: str, mode: str) -> bool:
    """Whether the GCS accepts a connection in an authentication mode, ``disabled`` or ``token``."""
    command = [sys.executable, "-c", AUTHENTICATION_PROBE, gcs]
    environment = os.environ | {"RAY_AUTH_MODE": mode}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"what answers at {gcs} is not the head of a Ray cluster: name the head's port") from None
    if done.returncode not in (0, REJECTED):
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]
        raise ConfigError(
            f"cannot find out whether the cluster at {gcs} requires a token: {reason}: check it with `ray status` on the head node"
        )
    return done.returncode == 0


def ensure_token() -> None:
    """Create a token for a Ray on this machine, readable by this account only; one that Ray creates follows the umask.

    Where the home directory is not writable, the token is passed in the environment of this process and its workers.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or has_token():
        return
    token = secrets.token_hex(32)
    try:
        path = Path.home() / ".ray/auth_token"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic_write(path, concurrent=True, overwrite=False, mode=0o600) as file:
            file.write(token.encode())
    except FileExistsError:
        pass  # another process was faster
    except (OSError, RuntimeError):  # the home directory is missing or not writable
        os.environ["RAY_AUTH_TOKEN"] = token
    reload_token()
