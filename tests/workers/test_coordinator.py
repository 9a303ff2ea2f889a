"""The coordinator of a worker group, without Ray around it."""

import asyncio

import pytest

from csmae.workers import coordinator as coordinator_module
from csmae.workers.coordinator import Coordinator
from csmae.workers.group import WorkerGroupTrainable
from csmae.workers.messages import (
    Assignment,
    AssignmentEnded,
    EpochReport,
    FitEnded,
    HeartbeatTimeout,
    Outcome,
    ResourcesHeld,
)

CONFIG = {"train": {"epochs": 2}}


@pytest.fixture(autouse=True)
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "POLL_INTERVAL_S", 0.05)
    monkeypatch.setattr(coordinator_module, "STARTUP_TIMEOUT_S", 0.3)


async def waiting(retries: int, hang_timeout_s: float) -> Coordinator:
    """A coordinator with an assignment for workers that have not started."""
    coordinator = Coordinator(retries, hang_timeout_s)
    await coordinator.assign(CONFIG, "trials/0", 2)
    assert await coordinator.next_event() == ResourcesHeld(False)
    return coordinator


async def assigned(attempt: str) -> Coordinator:
    """A coordinator whose assignment an attempt has taken."""
    coordinator = await waiting(retries=2, hang_timeout_s=0.2)
    await coordinator.next_assignment(attempt, 0, f"worker of {attempt}")
    return coordinator


def test_a_trial_whose_silent_workers_are_not_replaced_fails() -> None:
    async def scenario() -> None:
        coordinator = await assigned("one")
        assert await coordinator.next_event() == HeartbeatTimeout(["worker of one"])
        ended = await coordinator.next_event()
        assert isinstance(ended, AssignmentEnded) and ended.outcome is Outcome.FAILED
        assert ended.reason == (
            "no heartbeat from the workers for 0.2 s, and no replacement workers started within 0.3 s"
        )

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_trial_continues_with_the_workers_that_replace_silent_ones() -> None:
    async def scenario() -> None:
        coordinator = await assigned("one")
        assert await coordinator.next_event() == HeartbeatTimeout(["worker of one"])
        await coordinator.next_assignment("two", 0, "worker of two")
        decision = asyncio.create_task(coordinator.report(1, "two", 1, {"train/loss": 1.0}))
        assert await coordinator.next_event() == EpochReport(1, {"train/loss": 1.0})
        following = asyncio.create_task(coordinator.next_event())
        assert await decision
        assert await following == HeartbeatTimeout(["worker of two"])

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_only_deaths_without_an_epoch_in_between_count_as_attempts() -> None:
    async def scenario() -> None:
        coordinator = await assigned("one")
        for attempt in ("two", "three"):
            await coordinator.next_assignment(attempt, 0, f"worker of {attempt}")
            await coordinator.report_error(1, attempt, "an error from which the trial recovered")
        await coordinator.report_saved(1, "three", 1, {})
        for attempt in ("four", "five"):
            assert await coordinator.next_assignment(attempt, 0, f"worker of {attempt}")
        assert await coordinator.next_event() == EpochReport(1, {})
        sixth = asyncio.create_task(coordinator.next_assignment("six", 0, "worker of six"))
        ended = await coordinator.next_event()
        assert isinstance(ended, AssignmentEnded) and ended.reason == "a worker's process died (in each of 3 attempts)"
        sixth.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_group_that_exits_with_its_work_saved_costs_no_attempt() -> None:
    async def scenario() -> None:
        coordinator = await assigned("attempt 0")
        for number in range(5):
            await coordinator.preempted(1, f"attempt {number}")
            await coordinator.preempted(1, f"attempt {number}")  # from each rank
            await coordinator.next_assignment(f"attempt {number + 1}", 0, "worker")
        decision = asyncio.create_task(coordinator.report(1, "attempt 5", 1, {}))
        assert await coordinator.next_event() == EpochReport(1, {})
        await coordinator.assign(CONFIG, "trials/1", 2)
        assert not await decision

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_workers_that_never_take_their_first_assignment_are_considered_dead() -> None:
    async def scenario() -> None:
        coordinator = await waiting(retries=1, hang_timeout_s=0.2)
        await coordinator.workers_started(["rank 0", "rank 1"])
        assert await coordinator.next_event() == ResourcesHeld(True)
        assert await coordinator.next_event() == HeartbeatTimeout(["rank 0", "rank 1"])
        await coordinator.workers_stopped()
        await coordinator.workers_started(["rank 0 again", "rank 1 again"])
        assert [await coordinator.next_event(), await coordinator.next_event()] == [
            ResourcesHeld(False),
            ResourcesHeld(True),
        ]
        assert await coordinator.next_event() == HeartbeatTimeout(["rank 0 again", "rank 1 again"])
        ended = await coordinator.next_event()
        assert isinstance(ended, AssignmentEnded) and ended.outcome is Outcome.FAILED
        assert ended.reason == "the workers did not start the trial within 0.3 s (in each of 2 attempts)"

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_workers_that_hang_between_two_trials_are_considered_dead() -> None:
    async def scenario() -> None:
        coordinator = Coordinator(retries=1, hang_timeout_s=0.2)
        await coordinator.workers_started(["rank 0"])
        await coordinator.assign(CONFIG, "trials/0", 2)
        await coordinator.next_assignment("one", 0, "rank 0")
        await coordinator.end(1, "one", Outcome.FINISHED)
        assert [await coordinator.next_event(), await coordinator.next_event()] == [
            ResourcesHeld(True),
            AssignmentEnded(Outcome.FINISHED),
        ]
        await coordinator.assign(CONFIG, "trials/1", 2)
        assert await coordinator.next_event() == ResourcesHeld(True)
        assert await coordinator.next_event() == HeartbeatTimeout(["rank 0"])

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_replacement_workers_get_the_startup_timeout() -> None:
    async def scenario() -> None:
        coordinator = await assigned("one")
        assert await coordinator.next_event() == HeartbeatTimeout(["worker of one"])
        await asyncio.sleep(0.2)
        await coordinator.workers_started(["worker of two"])
        assert await coordinator.next_event() == ResourcesHeld(True)
        await asyncio.sleep(0.2)
        await coordinator.next_assignment("two", 0, "worker of two")
        following = asyncio.create_task(coordinator.next_event())
        assert await following == HeartbeatTimeout(["worker of two"])

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_group_that_waits_for_resources_is_not_silent() -> None:
    async def scenario() -> None:
        coordinator = await waiting(retries=1, hang_timeout_s=0.1)
        await coordinator.workers_stopped()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(coordinator.next_event(), 1)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_no_worker_continues_before_the_decision() -> None:
    async def scenario() -> None:
        coordinator = await assigned("one")
        decision = asyncio.create_task(coordinator.report(1, "one", 1, {}))
        await coordinator.workers_started(["worker of one"])
        await asyncio.sleep(0)
        events = [await coordinator.next_event(), await coordinator.next_event()]
        assert events == [ResourcesHeld(True), EpochReport(1, {})]
        await asyncio.sleep(0.05)
        assert not decision.done(), "epoch 1 was delivered, but the decision is still missing"
        following = asyncio.create_task(coordinator.next_event())
        assert await decision
        following.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_groups_that_request_smaller_micro_batches_cost_no_attempt() -> None:
    async def scenario() -> None:
        coordinator = await waiting(retries=0, hang_timeout_s=60)
        for number, size in enumerate((64, 32, 16, 8, 4, 2, 1)):
            assignment = await coordinator.next_assignment(f"attempt {number}", 0, "worker")
            assert assignment is not None and assignment.micro_batch == (2 * size if number else None)
            await coordinator.shrink_micro_batch(1, f"attempt {number}", size)
            await coordinator.shrink_micro_batch(1, f"attempt {number}", size)  # from a second rank
            await coordinator.report_error(
                1, f"attempt {number}", "connection closed by peer"
            )  # how the other ranks see it
            await coordinator.fit_ended(FitEnded(number, "RuntimeError: SmallerMicroBatchError"))
            assert await coordinator.next_event() == FitEnded(number, "")
        assignment = await coordinator.next_assignment("attempt 7", 0, "worker")
        assert assignment is not None and assignment.micro_batch == 1
        decision = asyncio.create_task(coordinator.report(1, "attempt 7", 1, {}))
        assert await coordinator.next_event() == EpochReport(1, {})
        decision.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_micro_batch_that_does_not_shrink_is_a_failed_attempt() -> None:
    async def scenario() -> None:
        coordinator = await waiting(retries=0, hang_timeout_s=60)
        for attempt in ("one", "two"):
            await coordinator.next_assignment(attempt, 0, "worker")
            await coordinator.shrink_micro_batch(1, attempt, 4)
        await coordinator.fit_ended(FitEnded(1, "a reason"))
        assert await coordinator.next_event() == FitEnded(1, "a reason")
        third = asyncio.create_task(coordinator.next_assignment("three", 0, "worker"))
        ended = await coordinator.next_event()
        assert isinstance(ended, AssignmentEnded)
        assert ended.reason == "out of memory again with micro-batches of 4 pairs (in each of 1 attempts)"
        third.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_trial_that_tune_restarts_learns_that_it_holds_no_resources() -> None:
    """Tune restarts a trial whose trainable died without notifying the searcher."""

    async def scenario() -> None:
        coordinator = Coordinator(retries=1, hang_timeout_s=60)
        await coordinator.assign(CONFIG, "trials/0", 2)
        assert await coordinator.next_event() == ResourcesHeld(False)
        await coordinator.workers_started(["rank 0"])
        assert await coordinator.next_event() == ResourcesHeld(True)

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_an_assignment_that_ends_before_the_training_does_is_paused() -> None:
    async def scenario() -> None:
        coordinator = Coordinator(retries=1, hang_timeout_s=60)
        for number, (until, outcome) in enumerate(((1, Outcome.PAUSED), (2, Outcome.FINISHED)), start=1):
            await coordinator.assign(CONFIG, "trials/1", until, "trials/0")
            assert await coordinator.next_event() == ResourcesHeld(False)
            assignment = await coordinator.next_assignment("one", number - 1, "rank 0")
            assert assignment == Assignment(number, CONFIG, "trials/1", until, "trials/0")
            assert assignment.outcome is outcome

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_rank_that_dies_while_its_pause_is_stored_is_replaced_and_the_pause_is_reported_once() -> None:
    """The trainable has received the last epoch, and waits for the end of the assignment."""

    async def scenario() -> None:
        coordinator = await waiting(retries=2, hang_timeout_s=60)
        await coordinator.next_assignment("one", 0, "rank 0")
        lost = asyncio.create_task(coordinator.report(1, "one", 2, {"a": 1.0}))
        assert await coordinator.next_event() == EpochReport(2, {"a": 1.0})
        ended = asyncio.create_task(coordinator.next_event())
        assert await lost
        await coordinator.next_assignment("two", 0, "rank 0 again")
        await coordinator.report_saved(1, "two", 2, {"a": 1.0})
        await coordinator.end(1, "one", Outcome.PAUSED)
        await asyncio.sleep(0.1)
        assert not ended.done(), "the first attempt is dead"
        await coordinator.end(1, "two", Outcome.PAUSED)
        assert await ended == AssignmentEnded(Outcome.PAUSED)

    asyncio.run(asyncio.wait_for(scenario(), 20))


class ScriptedTrainable(WorkerGroupTrainable):
    """A trainable in the middle of a trial of two epochs, with given events."""

    def __init__(self, *events: EpochReport | ResourcesHeld | AssignmentEnded) -> None:
        self._events, self._failed_fits = iter(events), 0
        self._until, self._last_epoch = 2, {}

    def _next_event(self) -> EpochReport | ResourcesHeld | AssignmentEnded:
        return next(self._events)


def test_a_group_that_waits_for_resources_after_the_last_epoch_reports_it() -> None:
    last = EpochReport(2, {"a": 1.0})
    trainable = ScriptedTrainable(
        EpochReport(1, {}), last, ResourcesHeld(False), ResourcesHeld(True), AssignmentEnded(Outcome.FINISHED)
    )
    assert [trainable.step() for _ in range(4)] == [
        {"epoch": 1, "metrics": {}},
        {"resources_held": False},
        {"resources_held": True},
        {"epoch": 2, "metrics": {"a": 1.0}, "finished": "", "done": True},
    ]


def test_a_group_whose_checkpoint_is_already_there_reports_its_epoch_and_pauses() -> None:
    trainable = ScriptedTrainable(EpochReport(3, {"a": 1.0}), AssignmentEnded(Outcome.PAUSED))
    assert trainable.step() == {"epoch": 3, "metrics": {"a": 1.0}, "paused": "", "done": True}
