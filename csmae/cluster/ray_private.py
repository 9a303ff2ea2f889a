"""Every use of a private name of Ray, each with the public form that is missing.

A new version of Ray may rename or change them: check this file then. Names of Ray Train are imported inside the functions, because
``ray.train`` takes seconds to import and only worker groups need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import ActorID, PlacementGroupID
from ray._private.authentication.authentication_token_setup import (
    AuthenticationTokenLoader,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup

REJECTED = 3
"""Exit status of ``AUTHENTICATION_PROBE`` where the cluster does not accept this account's token, or there is none."""

AUTHENTICATION_PROBE = f"""
import os, sys
from ray._raylet import AuthenticationTokenLoader, GcsClient
from ray.exceptions import AuthenticationError
if os.environ["RAY_AUTH_MODE"] == "token" and not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
    sys.exit({REJECTED})
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit({REJECTED})
"""
"""Program that connects to a GCS address in the authentication mode of its environment.

``ray.init`` is the only public way to connect: it joins the cluster, and retries a rejection for half a minute. A process of
its own, because Ray reads the authentication mode once per process.
"""


def resolve_address(address: str) -> str | None:
    """Resolve ``auto`` or a host name as ``ray.init`` does; None where the address means a new Ray.

    ``ray.init`` returns the resolved address only once it has joined the cluster.

    Raises:
        OSError, ValueError: The address is malformed, or no Ray runs on this machine.
    """
    resolved = canonicalize_bootstrap_address(address)
    return None if resolved is None else str(resolved)


def has_token() -> bool:
    """Whether Ray finds a token in the environment or in this account's files; there is no public function for it."""
    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def reload_token() -> None:
    """Make Ray read the token again; it caches the first result for the life of the process."""
    AuthenticationTokenLoader.instance().reset_cache()


def enable_token_authentication() -> None:
    """Send this account's token with every request; ``ray.init`` does so for the address ``auto`` only."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def start_local_ray(temp_dir: str | None, **options: Any) -> None:
    """Start a Ray on the loopback interface.

    ``ray.init`` has only underscored parameters for the node's address and the temporary folder.

    Args:
        temp_dir: Folder of Ray's files and sockets; None is Ray's default.
        options: Further arguments of ``ray.init``.
    """
    ray.init(address="local", _node_ip_address="127.0.0.1", _temp_dir=temp_dir, **options)


def hide_worker_logs() -> None:
    """Keep the raylet's messages about dead workers off the terminal; ``log_to_driver=False`` does not cover them."""
    ray._private.worker._worker_logs_enabled = False


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be preempted; ``ray.nodes()`` does not mark them."""
    return set(state.get_draining_nodes())


def orphaned_placement_groups() -> Iterator[PlacementGroup]:
    """The placement groups of this job whose creator, an actor, is dead.

    ``ray.util.placement_group_table()`` omits the creator; ``ray.util.state`` needs the dashboard.
    """
    job = ray.get_runtime_context().get_job_id()
    for serialized in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(serialized)
        created_by_actor = group.creator_actor_id not in (b"", ActorID.nil().binary())
        exists = group.state != PlacementGroupTableData.REMOVED
        if created_by_actor and exists and group.creator_job_id.hex() == job and _is_creator_dead(group):
            yield PlacementGroup(PlacementGroupID(group.placement_group_id))


def _is_creator_dead(group: PlacementGroupTableData) -> bool:
    actor = state.actor_table(ActorID(group.creator_actor_id).hex())
    return bool(group.creator_actor_dead) or actor.get("State") == "DEAD"


def worker_group_callback_class() -> Any:
    """Base class of callbacks that Ray Train's controller calls when it starts and stops train workers.

    The public ``ray.train.UserCallback`` is called for reports and exceptions only.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    return WorkerGroupCallback


def is_startup_timeout(error: Exception) -> bool:
    """Whether ``fit()`` failed because no node had the workers' resources in time.

    The public ``ControllerError`` contains the cause, but the cause's class is private.
    """
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def preemption_check() -> Callable[[], bool]:
    """A function that says whether a node of this train worker's group will be preempted.

    The public ``ray.train.get_preemption_info`` is a collective, too slow to call after each step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    context = get_train_context().preemption_context
    return lambda: context.preemption_info is not None
