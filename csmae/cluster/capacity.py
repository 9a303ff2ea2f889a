"""How many trials a cluster has room for while nodes come and go."""

from __future__ import annotations

import time

from csmae.cluster.session import allocate, current_resources
from csmae.config import ConfigError
from csmae.study.options import Search

LOOK_EVERY_S = 5.0


class ConcurrencyLimit:
    """Slots that fit at the moment.

    Args:
        search: What a trial takes.
        slots: That fitted at the start.
    """

    def __init__(self, search: Search, slots: int) -> None:
        self._search, self._slots, self._looked = search, slots, time.monotonic()

    def __call__(self) -> int:
        """None where nothing fits any more: trials then wait for nodes to come back."""
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            try:
                self._slots = allocate(self._search, current_resources("the cluster")).max_concurrent
            except ConfigError:
                self._slots = 0
        return self._slots
