"""Frees what a killed process had reserved, so that its successor can start."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import ActorID, PlacementGroupID
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

INTERVAL_S = 2.0

log = logging.getLogger(__name__)


@contextmanager
def freeing_orphans() -> Iterator[None]:
    """Free the placement groups of dead actors for as long as the block lasts."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(INTERVAL_S):
            try:
                free_orphans()
            except Exception as error:  # Ray's books may be out of reach for a moment; the next round looks again
                log.warning("cannot look for orphaned reservations: %s", error)

    thread = threading.Thread(target=watch, name="reaper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def free_orphans() -> None:
    """Remove the placement groups of this job whose creator, an actor, is dead.

    Ray keeps them until the whole job ends, and Ray Train's own cleaner needs the dashboard. What an actor reserves in
    its last moment Ray keeps for longer than the job: it has noted the actor's end before. The table's public form does
    not name the creator, hence Ray's inner one.
    """
    job = ray.get_runtime_context().get_job_id()
    for data in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        by_actor = group.creator_actor_id not in (b"", ActorID.nil().binary())
        there = group.state != PlacementGroupTableData.REMOVED
        if by_actor and there and group.creator_job_id.hex() == job and _creator_is_dead(group):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def _creator_is_dead(group: PlacementGroupTableData) -> bool:
    actor = state.actor_table(ActorID(group.creator_actor_id).hex())
    return bool(group.creator_actor_dead) or actor.get("State") == "DEAD"
