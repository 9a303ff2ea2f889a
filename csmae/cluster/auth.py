"""The door of a Ray cluster: who answers there, whether it asks for a token, whether it takes ours."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

from ray._private.authentication.authentication_token_setup import (
    AuthenticationTokenLoader,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import canonicalize_bootstrap_address

from csmae.config import ConfigError

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 40.0

REFUSED = 3

PROBE = f"""
import os, sys
from ray._raylet import AuthenticationTokenLoader, GcsClient
from ray.exceptions import AuthenticationError
if os.environ["RAY_AUTH_MODE"] == "token" and not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
    sys.exit({REFUSED})
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit({REFUSED})
"""
"""A process of its own: Ray reads its authentication mode once a process, and takes half a minute over a refusal."""


def find(address: str) -> str:
    """Where the cluster's books (GCS) answer.

    Args:
        address: ``auto``, which is ``RAY_ADDRESS`` or a Ray that runs on this machine, or ``host:port``.

    Returns:
        ``host:port``.

    Raises:
        ConfigError: Nobody is there.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: a search runs on a node of its cluster: log in there and use --address auto"
        )
    try:
        found = canonicalize_bootstrap_address(address)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--address {address}: no Ray there: {_one_line(error)}: name HOST:PORT of its head, or start it (`ray start --head`)"
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
    return str(found)


def enter(gcs_address: str, insecure: bool) -> bool:
    """Make sure that a cluster keeps strangers out and lets this process in, and have Ray show the token.

    Args:
        gcs_address: From ``find``.
        insecure: Whether a cluster may be joined that lets everybody in.

    Returns:
        Whether it asks for a token.

    Raises:
        ConfigError: It lets everybody in, does not take our token, or is no Ray.
    """
    if _accepts(gcs_address, "disabled"):
        if not insecure:
            raise ConfigError(
                f"the cluster at {gcs_address} asks nobody for a token: whoever reaches it can run programs on it: start "
                "it with RAY_AUTH_MODE=token (docs/security.md), or accept that with --insecure"
            )
        return False
    if not _accepts(gcs_address, "token"):
        raise ConfigError(
            f"the cluster at {gcs_address} does not take the token of this account: copy ~/.ray/auth_token of its head, "
            "closed to others (chmod 600), or name it in RAY_AUTH_TOKEN_PATH"
        )
    os.environ.pop("RAY_AUTH_MODE", None)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # Ray does so for the address `auto` only
    return True


def _write_whole(path: Path, text: str) -> None:
    """Make a file that others read at once: it is there with all its text, or not at all.

    Raises:
        FileExistsError: It is there already.
    """
    new = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        new.chmod(0o600)
        os.link(new, path)
    finally:
        new.unlink(missing_ok=True)


def ensure_token() -> None:
    """See that a Ray of our own has a token which this account alone may read: Ray makes one that the umask opens.

    Where the home cannot be written, the token is for this process and its workers, in their environment.
    """
    loader = AuthenticationTokenLoader.instance()
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or loader.has_token(ignore_auth_mode=True):
        return
    token = secrets.token_hex(32)
    try:
        path = Path.home() / ".ray/auth_token"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _write_whole(path, token)
    except FileExistsError:
        pass  # another process was quicker
    except (OSError, RuntimeError):  # no home that can be written, or none at all
        os.environ["RAY_AUTH_TOKEN"] = token
    loader.reset_cache()


def _accepts(gcs_address: str, mode: str) -> bool:
    command = [sys.executable, "-c", PROBE, gcs_address]
    environment = os.environ | {"RAY_AUTH_MODE": mode}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"what answers at {gcs_address} is no head of a Ray cluster: name the head's port") from None
    if done.returncode not in (0, REFUSED):
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]
        raise ConfigError(
            f"the cluster at {gcs_address} cannot be asked whether it wants a token: {reason}: check it with `ray status` on the head node"
        )
    return done.returncode == 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
