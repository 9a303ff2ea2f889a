"""The coordinator of a worker group: the group's other processes exchange messages only through it.

The train workers run in *attempts*, as Ray Train calls them: each start or restart of all of them is a new one.

The sequence of an assignment:

1. The trainable calls ``assign``, then ``next_event`` in a loop, which returns one event per call, ``ResourcesHeld`` first.
2. The controller calls ``workers_started`` once the ranks' processes hold their resources: event ``ResourcesHeld`` again.
3. Every rank waits in ``next_assignment`` and receives the assignment.
4. Ranks call ``heartbeat`` while they train; too long without one: event ``HeartbeatTimeout``, and the trainable kills them.
5. After an epoch every rank waits in ``report`` for the decision; rank 0's call is the event ``EpochReport``.
6. ``next_event``, called again, decides to continue: the ranks' calls return True.
7. ``assign``, called instead because Tune stopped the trial, decides to stop: they return False, and the ranks go to 3.
8. A rank that fails calls ``report_error``; Ray Train restarts all workers, a new attempt, at 2 until no retry is left.
9. Rank 0 calls ``end`` once the assignment's last epoch is stored, or when all ranks failed alike: event ``AssignmentEnded``.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from csmae.workers.messages import (
    Assignment,
    AssignmentEnded,
    CoordinatorEvent,
    EpochReport,
    FitEnded,
    HeartbeatTimeout,
    Outcome,
    ResourcesHeld,
)

POLL_INTERVAL_S = 1.0
"""Time between checks of the last heartbeat."""

STARTUP_TIMEOUT_S = 300.0
"""Minimum time for workers to start or to be replaced: their node may be busy."""


@dataclass
class _AssignmentState:
    """Progress of the current assignment."""

    reported_epoch: int = 0
    """Last epoch that the workers reported."""
    delivered_epoch: int = 0
    """Last epoch that the trainable received."""
    approved_epoch: int = 0
    """Last epoch after which the workers may continue."""
    attempts: list[str] = field(default_factory=list)
    """Attempts that took the assignment since its last epoch: more than one after a worker died."""
    workers: list[Any] = field(default_factory=list)
    """Actors of the last attempt that took it."""
    timed_out: bool = False
    """Whether the last attempt's heartbeat timed out, and no other attempt has replaced it."""
    errors: dict[str, str] = field(default_factory=dict)
    """By attempt, the first error that a rank reported."""
    exit_expected: bool = False
    """Whether the last attempt exits as intended, and no other attempt has replaced it."""


class Coordinator:
    """Passes assignments to the workers, and their reports to the trainable.

    Process: an asynchronous actor without resources of its own, one per worker group. It imports neither torch nor the training,
    so that it starts quickly.

    Args:
        retries: Attempts that may take an assignment after one died with it, without an epoch in between.
        hang_timeout_s: Seconds without a heartbeat after which workers are considered dead.
    """

    def __init__(self, retries: int, hang_timeout_s: float) -> None:
        self._retries, self._hang_timeout_s = retries, hang_timeout_s
        self._changed = asyncio.Condition()
        self._events: asyncio.Queue[CoordinatorEvent] = asyncio.Queue()
        self._num_assignments = 0
        self._assignment: Assignment | None = None
        self._state = _AssignmentState()
        self._workers: list[Any] = []
        """Actors that hold resources, from their start to their end, whether they took the assignment or not."""
        self._closed = False
        self._last_heartbeat = 0.0

    # Called by the trainable.

    async def assign(self, config: dict[str, Any], run_dir: str, until: int, parent_dir: str | None = None) -> None:
        """Assign a trial to the workers; those that still wait in ``report`` stop their trial. Returns immediately.

        Args:
            config: The training's configuration.
            run_dir: The trial's folder.
            until: Last epoch to train.
            parent_dir: Folder of another trial, whose checkpoint this one copies if it has none.
        """
        self._num_assignments += 1
        self._assignment = Assignment(self._num_assignments, config, run_dir, until, parent_dir)
        self._state = _AssignmentState()
        self._events = asyncio.Queue()
        # Sent even where it is False: Tune may have restarted the trial in a new process, after it held resources in another.
        self._events.put_nowait(ResourcesHeld(bool(self._workers)))
        await self._notify()

    async def next_event(self) -> CoordinatorEvent:
        """Let the workers continue after the last delivered epoch, and wait for the next event, or a heartbeat timeout."""
        self._state.approved_epoch = self._state.delivered_epoch
        self._last_heartbeat = time.monotonic()
        await self._notify()
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), POLL_INTERVAL_S)
            except TimeoutError:
                if self._expects_heartbeat and time.monotonic() - self._last_heartbeat > self._timeout_s:
                    return self._time_out()
                continue
            if isinstance(event, EpochReport):
                self._state.delivered_epoch = event.epoch
            return event

    async def close(self) -> None:
        """Make all workers return from ``train_loop`` after their current epoch. Returns immediately."""
        self._closed, self._assignment = True, None
        await self._notify()

    async def fit_ended(self, ended: FitEnded) -> None:
        """Pass on, from the trainable's thread, that a ``fit()`` ended by itself. Returns immediately."""
        self._set_workers([])
        self._events.put_nowait(replace(ended, reason="") if self._state.exit_expected else ended)

    # Called by Ray Train's controller when it starts or stops the workers; it does not wait for the calls.

    async def workers_started(self, workers: list[Any]) -> None:
        """Note the actors of a new attempt; from now on they must send heartbeats while there is an assignment."""
        self._state.timed_out, self._state.workers = False, []
        self._last_heartbeat = time.monotonic()
        self._set_workers(workers)

    async def workers_stopped(self) -> None:
        """Note that no worker holds resources."""
        self._set_workers([])

    # Called by every rank.

    async def next_assignment(self, attempt: str, last_id: int, worker: Any) -> Assignment | None:
        """Wait for an assignment.

        Args:
            attempt: Id that all ranks of an attempt share.
            last_id: Id of the rank's last assignment; 0 before the first.
            worker: The rank's actor.

        Returns:
            The same assignment for all ranks of an attempt; None when the group closes.
        """
        while not self._closed:
            assignment = self._assignment
            if assignment is not None and assignment.id > last_id and self._admit(attempt):
                self._state.workers.append(worker)
                self._last_heartbeat = time.monotonic()
                return assignment
            async with self._changed:
                await self._changed.wait()
        return None

    async def heartbeat(self, assignment_id: int, attempt: str) -> None:
        """Signal that the rank is alive in the middle of an epoch; it does not wait for the call."""
        if self._is_current(assignment_id, attempt):
            self._last_heartbeat = time.monotonic()

    async def report(self, assignment_id: int, attempt: str, epoch: int, metrics: dict[str, float] | None) -> bool:
        """Report an epoch and wait for the decision.

        Args:
            assignment_id: Id of the rank's assignment.
            attempt: Id of the rank's attempt.
            epoch: Number of trained epochs.
            metrics: From rank 0; None from the others.

        Returns:
            Whether to continue the assignment.
        """
        if metrics is not None:
            await self.report_saved(assignment_id, attempt, epoch, metrics)
        while self._is_current(assignment_id, attempt) and epoch > self._state.approved_epoch:
            async with self._changed:
                await self._changed.wait()
        return self._is_current(assignment_id, attempt)

    async def report_saved(self, assignment_id: int, attempt: str, epoch: int, metrics: dict[str, float]) -> None:
        """Report, from rank 0, the epoch of a loaded checkpoint, whose first report may have been lost. Returns immediately."""
        if self._is_current(assignment_id, attempt) and epoch > self._state.reported_epoch:
            self._state.reported_epoch = epoch
            del self._state.attempts[:-1]
            self._state.errors.clear()
            self._events.put_nowait(EpochReport(epoch, metrics))

    async def end(self, assignment_id: int, attempt: str, outcome: Outcome, reason: str = "") -> None:
        """End the assignment: from rank 0 where all ranks end alike, from any rank after a permanent error."""
        if self._is_current(assignment_id, attempt):
            self._end(outcome, reason)
            await self._notify()

    async def preempted(self, assignment_id: int, attempt: str) -> None:
        """Announce that the workers exit, with their work saved, because a node will be preempted; not a failed attempt."""
        if self._is_current(assignment_id, attempt):
            self._expect_exit()

    async def shrink_micro_batch(self, assignment_id: int, attempt: str, micro_batch: int) -> None:
        """Announce that the workers restart with a smaller micro-batch, because a rank was out of memory.

        Not a failed attempt: a micro-batch of one pair, which is never halved, is reached after a few restarts.
        """
        if self._is_current(assignment_id, attempt):
            assert self._assignment is not None
            before = self._assignment.micro_batch
            if before is None or micro_batch < before:
                self._assignment = replace(self._assignment, micro_batch=micro_batch)
                self._expect_exit()
            else:
                self._state.errors.setdefault(attempt, f"out of memory again with micro-batches of {before} pairs")

    async def report_error(self, assignment_id: int, attempt: str, error: str) -> None:
        """Report an error on one rank, before it makes the workers restart."""
        if self._is_current(assignment_id, attempt):
            self._state.errors.setdefault(attempt, error)

    # Internal.

    def _is_current(self, assignment_id: int, attempt: str) -> bool:
        """Whether the assignment is the current one, and the attempt the last one that took it."""
        is_assigned = self._assignment is not None and self._assignment.id == assignment_id
        return is_assigned and self._state.attempts[-1:] == [attempt]

    def _admit(self, attempt: str) -> bool:
        """Note that an attempt takes the assignment; end the assignment instead if too many attempts died with it."""
        state = self._state
        if attempt in state.attempts:
            return True
        if len(state.attempts) > self._retries:
            self._fail_after_retries(next(iter(state.errors.values()), "a worker's process died"))
            return False
        state.attempts.append(attempt)
        state.workers.clear()
        state.timed_out = state.exit_expected = False
        return True

    def _expect_exit(self) -> None:
        """Take the assignment from the current attempt, which exits as intended."""
        self._state.attempts.pop()
        self._state.workers.clear()
        self._state.exit_expected = True

    def _set_workers(self, workers: list[Any]) -> None:
        if bool(workers) != bool(self._workers):
            self._events.put_nowait(ResourcesHeld(bool(workers)))
        self._workers = workers

    @property
    def _expects_heartbeat(self) -> bool:
        """Whether workers exist that must send heartbeats, or must be replaced."""
        return self._assignment is not None and bool(self._state.workers or self._workers or self._state.timed_out)

    @property
    def _timeout_s(self) -> float:
        is_training = self._state.workers and not self._state.timed_out
        return self._hang_timeout_s if is_training else max(self._hang_timeout_s, STARTUP_TIMEOUT_S)

    def _time_out(self) -> CoordinatorEvent:
        """Consider the attempt dead; the assignment ends if it is not replaced in time, or no retry is left."""
        state, timeout_s = self._state, self._timeout_s
        self._last_heartbeat = time.monotonic()
        if state.timed_out:
            self._assignment = None
            text = f"no heartbeat from the workers for {self._hang_timeout_s:g} s"
            return AssignmentEnded(Outcome.FAILED, f"{text}, and no replacement workers started within {timeout_s:g} s")
        state.timed_out = True
        if state.workers:
            state.errors.setdefault(state.attempts[-1], f"no heartbeat from the workers for {timeout_s:g} s")
        else:
            text = f"the workers did not start the trial within {timeout_s:g} s"
            state.attempts.append(f"{len(state.attempts)}, which never took it")
            state.errors[state.attempts[-1]] = text
            if len(state.attempts) > self._retries:
                self._fail_after_retries(text)
        return HeartbeatTimeout([*self._workers, *(worker for worker in state.workers if worker not in self._workers)])

    def _fail_after_retries(self, reason: str) -> None:
        self._end(Outcome.FAILED, f"{reason} (in each of {len(self._state.attempts)} attempts)")

    def _end(self, outcome: Outcome, reason: str) -> None:
        self._assignment = None
        self._events.put_nowait(AssignmentEnded(outcome, reason))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
