"""The mailbox between a slot and its workers, without Ray around it."""

import asyncio

import pytest

from csmae.tuning import mailbox
from csmae.tuning.mailbox import EpochDone, Mailbox, Silence, TrialDone


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(mailbox, "START_S", 0.3)


async def assigned(group: str) -> Mailbox:
    """A mailbox whose assignment a group has taken."""
    box = Mailbox(retries=2, hang_timeout_s=0.2)
    await box.assign({}, "trials/0")
    await box.take(group, 0, f"worker of {group}")
    return box


def test_a_trial_whose_silent_workers_are_not_replaced_fails() -> None:
    async def course() -> None:
        box = await assigned("one")
        assert await box.next_event() == Silence(["worker of one"])
        ended = await box.next_event()
        assert isinstance(ended, TrialDone) and ended.outcome == "failed"
        assert ended.reason.startswith("no sign of life from the workers for 0.2 s, and for 0.3 s no others")

    asyncio.run(asyncio.wait_for(course(), 20))


def test_a_trial_goes_on_with_the_workers_that_replace_silent_ones() -> None:
    async def course() -> None:
        box = await assigned("one")
        assert await box.next_event() == Silence(["worker of one"])
        await box.take("two", 0, "worker of two")
        verdict = asyncio.create_task(box.tell(1, "two", 1, {"train/loss": 1.0}))
        assert await box.next_event() == EpochDone(1, {"train/loss": 1.0})
        following = asyncio.create_task(box.next_event())
        assert await verdict
        assert await following == Silence(["worker of two"])

    asyncio.run(asyncio.wait_for(course(), 20))


def test_only_deaths_without_an_epoch_in_between_count_as_attempts() -> None:
    async def course() -> None:
        box = await assigned("one")
        for group in ("two", "three"):
            await box.take(group, 0, f"worker of {group}")
        await box.replay(1, "three", 1, {})
        for group in ("four", "five"):
            assert await box.take(group, 0, f"worker of {group}")
        assert await box.next_event() == EpochDone(1, {})
        sixth = asyncio.create_task(box.take("six", 0, "worker of six"))
        ended = await box.next_event()
        assert isinstance(ended, TrialDone) and ended.reason == "a worker's process died (in each of 3 attempts)"
        sixth.cancel()

    asyncio.run(asyncio.wait_for(course(), 20))


def test_a_group_that_leaves_with_its_work_saved_costs_no_attempt() -> None:
    async def course() -> None:
        box = await assigned("group 0")
        for number in range(5):
            await box.leave(1, f"group {number}")
            await box.leave(1, f"group {number}")  # each rank tells
            await box.take(f"group {number + 1}", 0, "worker")
        verdict = asyncio.create_task(box.tell(1, "group 5", 1, {}))
        assert await box.next_event() == EpochDone(1, {})
        await box.assign({}, "trials/1")
        assert not await verdict

    asyncio.run(asyncio.wait_for(course(), 20))
