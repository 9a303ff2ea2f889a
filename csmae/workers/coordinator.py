"""The mailbox between a slot and its workers: assignments one way, epochs and verdicts the other.

Imports neither torch nor the training, so that its process starts in a moment.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from csmae.workers.messages import (
    Assignment,
    AssignmentDone,
    EpochReport,
    Event,
    GroupLost,
    HeartbeatTimeout,
    Outcome,
    ResourcesHeld,
)

LOOK_EVERY_S = 1.0
"""Between looks at how long the workers have been silent."""

START_S = 300.0
"""What workers get at least to start, and others to come in the place of silent ones: their node may be busy."""


@dataclass
class _AssignmentState:
    """How the open assignment goes."""

    reported: int = 0
    """Last epoch that the workers told."""
    delivered: int = 0
    """Last epoch of which the slot knows."""
    allowed: int = 0
    """Last epoch after which they may go on."""
    groups: list[str] = field(default_factory=list)
    """Groups that took the assignment since its last epoch: more than one after a worker died."""
    workers: list[Any] = field(default_factory=list)
    """Actors of the last group that took it."""
    silent: bool = False
    """Whether the last group was taken for dead, and no other has come in its place."""
    errors: dict[str, str] = field(default_factory=dict)
    """First error that a rank of a group told."""
    left: bool = False
    """Whether the last group went of its own accord, and none has come since."""


class Coordinator:
    """An asynchronous actor; the slot, the group's controller and every rank talk to it, nobody waits for another's process.

    Args:
        retries: Groups that may take an assignment after one died with it, without an epoch in between.
        hang_timeout_s: HeartbeatTimeout after which workers are taken for dead.
    """

    def __init__(self, retries: int, hang_timeout_s: float) -> None:
        self._retries, self._hang_timeout_s = retries, hang_timeout_s
        self._changed = asyncio.Condition()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._assignment: Assignment | None = None
        self._tickets = 0
        self._state = _AssignmentState()
        self._workers: list[Any] = []
        """Actors that hold resources, from their start to their end, whether they took the assignment or not."""
        self._closed = False
        self._heard_at = 0.0

    # Called by the slot.

    async def assign(self, config: dict[str, Any], run_dir: str) -> None:
        """Hand out a trial; workers that are still at another stop after its epoch."""
        self._tickets += 1
        self._assignment, self._state = Assignment(self._tickets, config, run_dir), _AssignmentState()
        self._events = asyncio.Queue()
        # False as well: a trial that Tune restarts in another process held resources when its last one died.
        self._events.put_nowait(ResourcesHeld(bool(self._workers)))
        await self._notify()

    async def next_event(self) -> Event:
        """Let the workers go on after the last epoch that was delivered, and wait for what comes of it."""
        self._state.allowed = self._state.delivered
        self._heard_at = time.monotonic()
        await self._notify()
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), LOOK_EVERY_S)
            except TimeoutError:
                if self._watched and time.monotonic() - self._heard_at > self._patience_s:
                    return self._silence()
                continue
            if isinstance(event, EpochReport):
                self._state.delivered = event.number
            return event

    async def close(self) -> None:
        """Send the workers home."""
        self._closed, self._assignment = True, None
        await self._notify()

    async def fit_ended(self, lost: GroupLost) -> None:
        """Tell the slot that one of its fits ended by itself."""
        self._hold([])
        if self._state.left:
            lost = replace(lost, reason="")
        self._events.put_nowait(lost)

    # Called by the group's controller.

    async def workers_started(self, workers: list[Any]) -> None:
        """Tell that a group's processes run; from now on they must give signs of life while there is an assignment."""
        self._state.silent, self._state.workers = False, []
        self._heard_at = time.monotonic()
        self._hold(workers)

    async def workers_stopped(self) -> None:
        """Tell that a group's resources are free, or have to be waited for."""
        self._hold([])

    def _hold(self, workers: list[Any]) -> None:
        if bool(workers) != bool(self._workers):
            self._events.put_nowait(ResourcesHeld(bool(workers)))
        self._workers = workers

    # Called by the ranks.

    async def next_assignment(self, group: str, after: int, worker: Any) -> Assignment | None:
        """Wait for an assignment.

        Args:
            group: Common to the ranks of a group, new after each restart.
            after: Ticket of the last assignment that the rank is done with.
            worker: The rank's actor.

        Returns:
            The same assignment for all ranks of a group, or None to go home.
        """
        while not self._closed:
            assignment = self._assignment
            if assignment is not None and assignment.ticket > after and self._admits(group):
                self._state.workers.append(worker)
                self._heard_at = time.monotonic()
                return assignment
            async with self._changed:
                await self._changed.wait()
        return None

    async def report(self, ticket: int, group: str, epoch: int, metrics: dict[str, float] | None) -> bool:
        """Tell of an epoch and wait for the verdict.

        Args:
            ticket: Of the assignment.
            group: Of the rank.
            epoch: Epochs done.
            metrics: From rank 0; None from the others.

        Returns:
            Whether to go on with the assignment.
        """
        if metrics is not None:
            await self.report_again(ticket, group, epoch, metrics)
        while self._stands(ticket, group) and epoch > self._state.allowed:
            async with self._changed:
                await self._changed.wait()
        return self._stands(ticket, group)

    async def report_again(self, ticket: int, group: str, epoch: int, metrics: dict[str, float]) -> None:
        """Tell of an epoch without waiting; one that was told before says nothing new."""
        if self._stands(ticket, group) and epoch > self._state.reported:
            self._state.reported = epoch
            del self._state.groups[:-1]
            self._events.put_nowait(EpochReport(epoch, metrics))

    async def heartbeat(self, ticket: int, group: str) -> None:
        """Tell that a rank is alive in the middle of an epoch."""
        if self._stands(ticket, group):
            self._heard_at = time.monotonic()

    async def finish(self, ticket: int, group: str, outcome: Outcome, reason: str = "") -> None:
        """Tell that the assignment is done, failed, or cannot go on now; on all ranks alike."""
        if self._stands(ticket, group):
            self._finish(AssignmentDone(outcome, reason))
            await self._notify()

    async def preempted(self, ticket: int, group: str) -> None:
        """Tell that the group goes, with its work saved, because a node will be taken away: no attempt that failed."""
        if self._stands(ticket, group):
            self._let_go()

    async def shrink_micro_batch(self, ticket: int, group: str, micro_batch: int) -> None:
        """Tell that the group goes because a rank's memory was too small, for another with a smaller micro-batch.

        No attempt that failed: the micro-batch reaches one pair, which needs no further group, after few of them.
        """
        if self._stands(ticket, group):
            assert self._assignment is not None
            before = self._assignment.micro_batch
            if before is None or micro_batch < before:
                self._assignment = replace(self._assignment, micro_batch=micro_batch)
                self._let_go()
            else:
                self._state.errors.setdefault(group, f"out of memory again with micro-batches of {before} pairs")

    def _let_go(self) -> None:
        """Forget the group at work, which goes of its own accord."""
        self._state.groups.pop()
        self._state.workers.clear()
        self._state.left = True

    async def report_error(self, ticket: int, group: str, error: str) -> None:
        """Tell of an error on one rank, before it takes the group down."""
        if self._stands(ticket, group):
            self._state.errors.setdefault(group, error)

    def _stands(self, ticket: int, group: str) -> bool:
        """Whether a rank's assignment is still the open one, and its group the one at work."""
        open_ticket = self._assignment is not None and self._assignment.ticket == ticket
        return open_ticket and self._state.groups[-1:] == [group]

    def _admits(self, group: str) -> bool:
        """Note a group that takes the assignment; the assignment fails when too many died with it."""
        groups = self._state.groups
        if group in groups:
            return True
        if len(groups) > self._retries:
            reason = next(iter(self._state.errors.values()), "a worker's process died")
            self._finish(AssignmentDone("failed", f"{reason} (in each of {len(groups)} attempts)"))
            return False
        groups.append(group)
        self._state.workers.clear()
        self._state.silent = False
        self._state.left = False
        return True

    @property
    def _watched(self) -> bool:
        """Whether there are workers who must give signs of life, or others who must come in their place."""
        return self._assignment is not None and bool(self._state.workers or self._workers or self._state.silent)

    @property
    def _patience_s(self) -> float:
        at_work = self._state.workers and not self._state.silent
        return self._hang_timeout_s if at_work else max(self._hang_timeout_s, START_S)

    def _silence(self) -> Event:
        course, patience_s = self._state, self._patience_s
        text = f"no sign of life from the workers for {patience_s:g} s"
        self._heard_at = time.monotonic()
        if course.silent:
            self._assignment = None
            text = f"no sign of life from the workers for {self._hang_timeout_s:g} s"
            return AssignmentDone("failed", f"{text}, and no replacement workers started within {patience_s:g} s")
        if not course.workers:
            text = f"the workers did not start the trial within {patience_s:g} s"
            course.groups.append(f"{len(course.groups)}, which never took it")
        course.silent = True
        course.errors.setdefault(course.groups[-1], text)
        if len(course.groups) > self._retries and not course.workers:
            self._assignment = None
            self._events.put_nowait(AssignmentDone("failed", f"{text} (in each of {len(course.groups)} attempts)"))
        silent = [*self._workers, *(worker for worker in course.workers if worker not in self._workers)]
        return HeartbeatTimeout(silent)

    def _finish(self, ended: AssignmentDone) -> None:
        self._assignment = None
        self._events.put_nowait(ended)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
