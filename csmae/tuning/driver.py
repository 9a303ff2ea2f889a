"""The search itself: Tune runs the max_concurrent, the searcher keeps the ledger, the listeners hear of it."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune import PlacementGroupFactory, Stopper

from csmae.cluster.capacity import ConcurrencyLimit
from csmae.cluster.session import Allocation
from csmae.config import ConfigError
from csmae.lock import unwritable
from csmae.scratch import scratch, scratch_root, unwritable_scratch
from csmae.storage.manifest import SupersededError
from csmae.study.options import seconds
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.early_stopping import make_stopping_rule
from csmae.tuning.events import Listener, SearchEnd
from csmae.tuning.scheduler import StoppingScheduler
from csmae.tuning.searcher import METRICS, StudySearcher
from csmae.workers.group import TRAINABLE_RESOURCES, WorkerGroupTrainable
from csmae.workers.spec import PRETRAIN, WorkerGroupSpec

TRAINABLE_RESTARTS = 2
"""Times that a trial may be started again because its slot's own process died."""


class StopController(Stopper):  # type: ignore[misc]
    """Ends a search in order: at the first Ctrl-C (the second is Python's own), with its budget, or because the searcher says so."""

    def __init__(self, budget: Budget, searcher: StudySearcher) -> None:
        self._budget, self._searcher = budget, searcher
        searcher.must_stop = self.stop_all
        self.ending = SearchEnd("done")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune's own snapshots are not used."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Single trials are the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Whether it is time; Tune asks several times a second."""
        if self.ending.kind == "done":
            if self._searcher.ending:
                self.ending = self._searcher.ending
            elif (files := self._budget.trial_store.files) and files.lost:
                self.ending = SearchEnd("superseded", files.lost)
            elif reason := self._budget.over():
                self.ending = SearchEnd("budget", reason)
            else:
                with self._searcher.writing():
                    self._budget.tick()
        return self.ending.kind != "done"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGHUP for as long as the block lasts."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.ending = SearchEnd("interrupted")
            signal.signal(signal.SIGINT, signal.default_int_handler)

        with _handled(ask, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does: what is open is closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals for as long as the block lasts; a SIGHUP that ``nohup`` has this process ignore stays ignored."""
    before = {number: signal.getsignal(number) for number in numbers}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def run_search(budget: Budget, allocation: Allocation, listener: Listener, pretrain: str = PRETRAIN) -> SearchEnd:
    """Run trials until the study has all it asked for. Ray must be running.

    Args:
        budget: Of the study.
        allocation: What fits.
        listener: Told of every event.
        pretrain: Module and name of the generator that trains.

    Returns:
        How it ended, see there for the trials that still ran.
    """
    trial_store = budget.trial_store
    search = trial_store.study.search
    searcher = StudySearcher(budget, listener, ConcurrencyLimit(search, allocation.max_concurrent))
    if reason := budget.over():
        with searcher.writing():
            searcher.abandon(reason)
        searcher.keeper.sweep()
        return searcher.ending or SearchEnd("budget", reason)
    stop_controller = StopController(budget, searcher)
    with _scratch(None if trial_store.files else trial_store.folder) as folder, stop_controller.listening():
        plan = WorkerGroupSpec(
            workers=search.workers_per_trial,
            cpus_per_worker=allocation.cpus_per_worker,
            gpus_per_worker=allocation.gpus_per_worker,
            retries=search.retries,
            hang_timeout_s=seconds(search.hang_timeout),
            scratch_dir=folder,
            pretrain=pretrain,
            files=trial_store.files,
            accelerator_type=allocation.accelerator_type,
        )
        _tuner(plan, searcher, stop_controller, trial_store).fit()
    ending = _superseded(trial_store) or stop_controller.ending
    with searcher.writing():
        budget.write()
        if ending.kind in ("budget", "hopeless"):
            searcher.abandon(ending.reason)
    searcher.keeper.sweep()
    if ending.kind == "superseded":
        return ending
    if searcher.ending and searcher.ending.kind == "stuck":
        return searcher.ending
    return SearchEnd("done", searcher.exhausted) if ending.kind == "done" and searcher.exhausted else ending


def _superseded(trial_store: TrialStore) -> SearchEnd | None:
    """Whether another driver took the storage over, which may be why workers could not go on."""
    try:
        if trial_store.files:
            trial_store.files.check()
    except SupersededError as error:
        return SearchEnd("superseded", str(error))
    except OSError:
        return None  # a bucket that does not answer hinders the other driver as well
    return None


@contextmanager
def _scratch(folder: Path | None) -> Iterator[str]:
    """A place for Tune's and Train's own notes; what a killed driver left of the kind is removed.

    Args:
        folder: That all nodes share; None is each node's own temporary folder.
    """
    if folder is None:
        with ExitStack() as stack:
            try:
                own = stack.enter_context(scratch("tune"))
            except OSError as error:
                raise unwritable_scratch(scratch_root(), error) from None
            yield str(own)
        return
    for stale in folder.glob("tune-*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        shared = tempfile.TemporaryDirectory(prefix="tune-", dir=folder)
    except OSError as error:
        raise ConfigError(unwritable(folder, error)) from None
    with shared as name:
        yield name


def _tuner(
    plan: WorkerGroupSpec, searcher: StudySearcher, stop_controller: StopController, trial_store: TrialStore
) -> tune.Tuner:
    search = trial_store.study.search
    rule = make_stopping_rule(search, trial_store.curves(), trial_store.study.longest)
    keys = [METRICS + name for name in search.objectives]
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(WorkerGroupTrainable, plan=plan), PlacementGroupFactory([TRAINABLE_RESOURCES])
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=StoppingScheduler(rule, keys, search.signs) if rule else None,
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=plan.scratch_dir,
            stop=stop_controller,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the trainings write their own
            failure_config=tune.FailureConfig(max_failures=TRAINABLE_RESTARTS),
            verbose=0,
        ),
    )
