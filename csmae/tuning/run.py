"""The search itself: Tune runs the slots, the searcher keeps the ledger, the listeners hear of it."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory, Stopper

from csmae.config import ConfigError
from csmae.tuning.cluster import Share
from csmae.tuning.events import Listener
from csmae.tuning.ledger import Ledger
from csmae.tuning.reaper import orphans_freed
from csmae.tuning.scheduler import EpochScheduler, make_rule
from csmae.tuning.searcher import METRICS, LedgerSearcher
from csmae.tuning.slots import PRETRAIN, SLIVER, Slot, SlotPlan

SLOT_RESTARTS = 2
"""Times that a trial may be started again because its slot's own process died."""


class Interrupt(Stopper):  # type: ignore[misc]
    """Ends a search in order at the first Ctrl-C; the second one is Python's own."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single trials are the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Whether somebody asked for the end."""
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for as long as the block lasts."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, interrupt)

        interrupt, terminate = signal.signal(signal.SIGINT, ask), signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, terminate)


def run_search(ledger: Ledger, folder: Path, share: Share, listener: Listener, pretrain: str = PRETRAIN) -> bool:
    """Run trials until the study has all it asked for. Ray must be running.

    Args:
        ledger: Of the study.
        folder: Of the study, absolute; trials have their folders in it.
        share: What fits.
        listener: Told of every event.
        pretrain: Module and name of the generator that trains.

    Returns:
        Whether it came to its end; False where it was interrupted, the running trials being left to go on later.
    """
    search = ledger.study.search
    rule = make_rule(search)
    metric = METRICS + search.objective
    if rule:
        for number, curve in ledger.curves():
            for epoch, value in curve.items():
                rule.keeps(number, epoch, ledger.sign * value)
    interrupt = Interrupt()
    with tempfile.TemporaryDirectory(prefix="tune-", dir=folder) as scratch, interrupt.listening(), orphans_freed():
        plan = SlotPlan(
            search.workers_per_trial, share.cpus_per_worker, share.gpus_per_worker, search.retries, scratch, pretrain
        )
        slot = tune.with_resources(tune.with_parameters(Slot, plan=plan), PlacementGroupFactory([{"CPU": SLIVER}]))
        tuner = tune.Tuner(
            slot,
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearcher(ledger, folder, listener),
                scheduler=EpochScheduler(rule, metric, ledger.sign) if rule else None,
                num_samples=-1,
                max_concurrent_trials=share.slots,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                stop=interrupt,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the trainings write their own
                failure_config=tune.FailureConfig(max_failures=SLOT_RESTARTS),
                verbose=0,
            ),
        )
        tuner.fit()
    return not interrupt.asked


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Hold the study's folder for this process.

    Raises:
        ConfigError: Another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "driver.lock").open("a+")
    except OSError as error:
        raise ConfigError(f"--storage: {error.filename} cannot be written: {error.strerror}") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"study {folder.name!r} is being run by process {file.read().strip()}: "
                "wait for its end, or use --name to begin another study"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
