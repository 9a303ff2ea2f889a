"""A connection to Ray for as long as a search lasts: to a cluster, or to a Ray started on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import ray

from csmae.cluster.auth import authenticate, ensure_token, gcs_address
from csmae.cluster.orphans import removing_orphans
from csmae.cluster.ray_private import hide_worker_logs, start_local_ray
from csmae.cluster.resources import ClusterResources, current_resources
from csmae.cluster.temp_dir import ray_temp_dir
from csmae.config import ConfigError, one_line
from csmae.engine_logs import quiet_ray

OBJECT_STORE_BYTES = 256 * 2**20
"""Size of Ray's object store on this machine. A search puts only small objects there."""

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output cannot be silenced
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative data.path means the same in every process
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # delay until a dead worker is noticed
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",  # trials that start at the same time; the searcher limits how many run
    "TUNE_GLOBAL_CHECKPOINT_S": "31536000",  # Tune's own snapshots are not used, and grow with the number of trials
}
"""Environment variables that Ray reads in every search."""

LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # this machine is not preempted under its own driver
    "OMP_NUM_THREADS": "1",  # each worker sets its own number of threads
}
"""Further ones for a Ray on this machine alone."""


@contextmanager
def ray_running(
    address: str | None, resources: ClusterResources | None, verbose: bool, insecure: bool = False
) -> Iterator[ClusterResources]:
    """Connect this process to Ray for as long as the block lasts.

    Args:
        address: Cluster to join; None starts a Ray on this machine, which stops with the block.
        resources: What a Ray on this machine may use; None for a cluster.
        verbose: Whether Ray's own logs are shown.
        insecure: Whether to join a cluster that requires no token.

    Yields:
        Ray's resources.

    Raises:
        ConfigError: No cluster runs at the address, it rejects this account's token, or it requires none.
    """
    os.environ.update(SETTINGS if address else SETTINGS | LOCAL_SETTINGS)
    options = {"logging_level": logging.INFO if verbose else logging.WARNING, "log_to_driver": verbose}
    if not verbose:
        hide_worker_logs()
        quiet_ray()
    gcs = gcs_address(address) if address else None
    requires_token = authenticate(gcs, insecure) if gcs else True
    with ExitStack() as stack:
        try:
            if gcs:
                ray.init(address=gcs, **options)
            else:
                assert resources is not None
                _start_local(resources, stack, options)
        except ConfigError:
            raise
        except Exception as error:  # Ray raises any type, a bare Exception where a node does not start in time
            raise _unusable(address, error) from None
        stack.callback(ray.shutdown)
        stack.enter_context(removing_orphans())  # to the very end: the scoring needs what the last trials left reserved
        found = current_resources(f"the cluster at {address}" if address else "this machine")
        yield replace(found, requires_token=requires_token)


def _start_local(resources: ClusterResources, stack: ExitStack, options: dict[str, Any]) -> None:
    """Start a Ray on this machine, even if the environment names another one or another one runs here."""
    os.environ.pop("RAY_ADDRESS", None)  # this process and its workers must not join another cluster
    ensure_token()
    start_local_ray(
        temp_dir=stack.enter_context(ray_temp_dir()),
        num_cpus=int(resources.cpus),
        num_gpus=int(resources.gpus),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **options,
    )


def _unusable(address: str | None, error: Exception) -> ConfigError:
    reason = one_line(error)
    if address:
        return ConfigError(
            f"Ray at {address} cannot be used: {reason}: check it with `ray status`, and compare versions with "
            f"`python -m csmae doctor --address {address}`"
        )
    return ConfigError(
        f"Ray on this machine cannot be used: {reason}: run again with --verbose to see Ray's own logs, and check that memory and "
        "the temporary folder (TMPDIR) are not full"
    )
