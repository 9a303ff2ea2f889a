"""Removes orphaned placement groups: reservations of a process that died, which keep its successor from starting."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.placement_group import remove_placement_group

from csmae.cluster.ray_private import orphaned_placement_groups

POLL_INTERVAL_S = 2.0

log = logging.getLogger(__name__)


@contextmanager
def removing_orphans() -> Iterator[None]:
    """Remove orphaned placement groups of this job, in a thread, for as long as the block lasts.

    Ray keeps them until the job ends, and Ray Train's own cleaner needs the dashboard. Ray keeps those that an actor creates while
    it dies even longer than the job, because it recorded the actor's end before.
    """
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_INTERVAL_S):
            try:
                for group in orphaned_placement_groups():
                    remove_placement_group(group)
            except Exception as error:  # the GCS may be unreachable for a moment; the next round tries again
                log.warning("cannot look for orphaned placement groups: %s", error)

    thread = threading.Thread(target=poll, name="orphan-removal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
