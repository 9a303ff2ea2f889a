"""The mailbox between a slot and its workers, without Ray around it."""

import asyncio

import pytest

from csmae.config import Config
from csmae.workers import coordinator as coordinator
from csmae.workers.coordinator import Coordinator
from csmae.workers.group import WorkerGroupTrainable
from csmae.workers.messages import AssignmentDone, EpochReport, GroupLost, HeartbeatTimeout, ResourcesHeld
from tests.conftest import SMALL


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(coordinator, "START_S", 0.3)


async def waiting(retries: int, hang_timeout_s: float) -> Coordinator:
    """A mailbox with an assignment for workers that have not started."""
    box = Coordinator(retries, hang_timeout_s)
    await box.assign({}, "trials/0")
    assert await box.next_event() == ResourcesHeld(False)
    return box


async def assigned(group: str) -> Coordinator:
    """A mailbox whose assignment a group has taken."""
    box = await waiting(retries=2, hang_timeout_s=0.2)
    await box.next_assignment(group, 0, f"worker of {group}")
    return box


def test_a_trial_whose_silent_workers_are_not_replaced_fails() -> None:
    async def course() -> None:
        box = await assigned("one")
        assert await box.next_event() == HeartbeatTimeout(["worker of one"])
        ended = await box.next_event()
        assert isinstance(ended, AssignmentDone) and ended.outcome == "failed"
        assert ended.reason == (
            "no sign of life from the workers for 0.2 s, and no replacement workers started within 0.3 s"
        )

    asyncio.run(asyncio.wait_for(course(), 20))


def test_a_trial_goes_on_with_the_workers_that_replace_silent_ones() -> None:
    async def course() -> None:
        box = await assigned("one")
        assert await box.next_event() == HeartbeatTimeout(["worker of one"])
        await box.next_assignment("two", 0, "worker of two")
        verdict = asyncio.create_task(box.report(1, "two", 1, {"train/loss": 1.0}))
        assert await box.next_event() == EpochReport(1, {"train/loss": 1.0})
        following = asyncio.create_task(box.next_event())
        assert await verdict
        assert await following == HeartbeatTimeout(["worker of two"])

    asyncio.run(asyncio.wait_for(course(), 20))


def test_only_deaths_without_an_epoch_in_between_count_as_attempts() -> None:
    async def course() -> None:
        box = await assigned("one")
        for group in ("two", "three"):
            await box.next_assignment(group, 0, f"worker of {group}")
        await box.report_again(1, "three", 1, {})
        for group in ("four", "five"):
            assert await box.next_assignment(group, 0, f"worker of {group}")
        assert await box.next_event() == EpochReport(1, {})
        sixth = asyncio.create_task(box.next_assignment("six", 0, "worker of six"))
        ended = await box.next_event()
        assert isinstance(ended, AssignmentDone) and ended.reason == "a worker's process died (in each of 3 attempts)"
        sixth.cancel()

    asyncio.run(asyncio.wait_for(course(), 20))


def test_a_group_that_leaves_with_its_work_saved_costs_no_attempt() -> None:
    async def course() -> None:
        box = await assigned("group 0")
        for number in range(5):
            await box.preempted(1, f"group {number}")
            await box.preempted(1, f"group {number}")  # each rank tells
            await box.next_assignment(f"group {number + 1}", 0, "worker")
        verdict = asyncio.create_task(box.report(1, "group 5", 1, {}))
        assert await box.next_event() == EpochReport(1, {})
        await box.assign({}, "trials/1")
        assert not await verdict

    asyncio.run(asyncio.wait_for(course(), 20))


def test_workers_that_never_take_their_first_assignment_are_taken_for_dead() -> None:
    async def course() -> None:
        box = await waiting(retries=1, hang_timeout_s=0.2)
        await box.workers_started(["rank 0", "rank 1"])
        assert await box.next_event() == ResourcesHeld(True)
        assert await box.next_event() == HeartbeatTimeout(["rank 0", "rank 1"])
        await box.workers_stopped()
        await box.workers_started(["rank 0 again", "rank 1 again"])
        assert [await box.next_event(), await box.next_event()] == [ResourcesHeld(False), ResourcesHeld(True)]
        assert await box.next_event() == HeartbeatTimeout(["rank 0 again", "rank 1 again"])
        ended = await box.next_event()
        assert isinstance(ended, AssignmentDone) and ended.outcome == "failed"
        assert ended.reason == "the workers did not start the trial within 0.3 s (in each of 2 attempts)"

    asyncio.run(asyncio.wait_for(course(), 20))


def test_warm_workers_that_hang_before_the_next_trial_are_taken_for_dead() -> None:
    async def course() -> None:
        box = Coordinator(retries=1, hang_timeout_s=0.2)
        await box.workers_started(["rank 0"])
        await box.assign({}, "trials/0")
        await box.next_assignment("one", 0, "rank 0")
        await box.finish(1, "one", "finished")
        assert [await box.next_event(), await box.next_event()] == [ResourcesHeld(True), AssignmentDone("finished")]
        await box.assign({}, "trials/1")
        assert await box.next_event() == ResourcesHeld(True)
        assert await box.next_event() == HeartbeatTimeout(["rank 0"])

    asyncio.run(asyncio.wait_for(course(), 20))


def test_workers_that_start_in_the_place_of_silent_ones_get_their_time() -> None:
    async def course() -> None:
        box = await assigned("one")
        assert await box.next_event() == HeartbeatTimeout(["worker of one"])
        await asyncio.sleep(0.2)
        await box.workers_started(["worker of two"])
        assert await box.next_event() == ResourcesHeld(True)
        await asyncio.sleep(0.2)
        await box.next_assignment("two", 0, "worker of two")
        following = asyncio.create_task(box.next_event())
        assert await following == HeartbeatTimeout(["worker of two"])

    asyncio.run(asyncio.wait_for(course(), 20))


def test_a_group_that_waits_for_resources_is_not_silent() -> None:
    async def course() -> None:
        box = await waiting(retries=1, hang_timeout_s=0.1)
        await box.workers_stopped()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.next_event(), 1)

    asyncio.run(asyncio.wait_for(course(), 20))


def test_no_worker_goes_on_after_an_epoch_that_was_not_judged() -> None:
    async def course() -> None:
        box = await assigned("one")
        verdict = asyncio.create_task(box.report(1, "one", 1, {}))
        await box.workers_started(["worker of one"])
        await asyncio.sleep(0)
        events = [await box.next_event(), await box.next_event()]
        assert events == [ResourcesHeld(True), EpochReport(1, {})]
        await asyncio.sleep(0.05)
        assert not verdict.done(), "epoch 1 was delivered, and nobody has said yet that the trial goes on"
        following = asyncio.create_task(box.next_event())
        assert await verdict
        following.cancel()

    asyncio.run(asyncio.wait_for(course(), 20))


def test_groups_that_ask_for_smaller_micro_batches_cost_no_attempt() -> None:
    async def course() -> None:
        box = await waiting(retries=0, hang_timeout_s=60)
        for number, size in enumerate((64, 32, 16, 8, 4, 2, 1)):
            assignment = await box.next_assignment(f"group {number}", 0, "worker")
            assert assignment is not None and assignment.micro_batch == (2 * size if number else None)
            await box.shrink_micro_batch(1, f"group {number}", size)
            await box.shrink_micro_batch(1, f"group {number}", size)  # two ranks at once
            await box.report_error(1, f"group {number}", "connection closed by peer")  # what the others see of it
            await box.fit_ended(GroupLost(number, "RuntimeError: SmallerMicroBatchError"))
            assert await box.next_event() == GroupLost(number, "")
        assignment = await box.next_assignment("group 7", 0, "worker")
        assert assignment is not None and assignment.micro_batch == 1
        verdict = asyncio.create_task(box.report(1, "group 7", 1, {}))
        assert await box.next_event() == EpochReport(1, {})
        verdict.cancel()

    asyncio.run(asyncio.wait_for(course(), 20))


def test_a_micro_batch_that_does_not_shrink_is_an_attempt_that_failed() -> None:
    async def course() -> None:
        box = await waiting(retries=0, hang_timeout_s=60)
        for group in ("one", "two"):
            await box.next_assignment(group, 0, "worker")
            await box.shrink_micro_batch(1, group, 4)
        await box.fit_ended(GroupLost(1, "a reason"))
        assert await box.next_event() == GroupLost(1, "a reason")
        third = asyncio.create_task(box.next_assignment("three", 0, "worker"))
        ended = await box.next_event()
        assert isinstance(ended, AssignmentDone)
        assert ended.reason == "out of memory again with micro-batches of 4 pairs (in each of 1 attempts)"
        third.cancel()

    asyncio.run(asyncio.wait_for(course(), 20))


def test_a_trial_that_a_new_mailbox_takes_over_is_told_that_it_holds_nothing() -> None:
    """Tune starts a trial again after the death of its slot, of which the search hears nothing."""

    async def course() -> None:
        box = Coordinator(retries=1, hang_timeout_s=60)
        await box.assign({}, "trials/0")
        assert await box.next_event() == ResourcesHeld(False)
        await box.workers_started(["rank 0"])
        assert await box.next_event() == ResourcesHeld(True)

    asyncio.run(asyncio.wait_for(course(), 5))


class ScriptedSlot(WorkerGroupTrainable):
    """A slot in the middle of a trial of two epochs, whose events are given."""

    def __init__(self, *events: EpochReport | ResourcesHeld | AssignmentDone) -> None:
        self._events, self._losses, self._last = iter(events), 0, None
        self._config = Config.model_validate(SMALL | {"train": {"epochs": 2}})

    def _next_event(self) -> EpochReport | ResourcesHeld | AssignmentDone:
        return next(self._events)


def test_a_group_that_waits_for_resources_after_the_last_epoch_says_so() -> None:
    last = EpochReport(2, {"a": 1.0})
    slot = ScriptedSlot(EpochReport(1, {}), last, ResourcesHeld(False), ResourcesHeld(True), AssignmentDone("finished"))
    assert [slot.step() for _ in range(4)] == [
        {"epoch": 1, "metrics": {}},
        {"holding": False},
        {"holding": True},
        {"epoch": 2, "metrics": {"a": 1.0}, "finished": "", "done": True},
    ]
