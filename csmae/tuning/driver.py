"""Runs a search: Ray Tune trains the trials that the searcher proposes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ray import tune
from ray.tune import PlacementGroupFactory

from csmae.cluster.resources import Allocation, ConcurrencyLimit
from csmae.config import ConfigError
from csmae.lock import describe_write_error
from csmae.scratch import scratch, scratch_root, unwritable_scratch
from csmae.storage.manifest import SupersededError
from csmae.study.options import seconds
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.events import Listener, SearchEnd, SearchOutcome
from csmae.tuning.scheduler import StrategyScheduler
from csmae.tuning.searcher import StudySearcher
from csmae.tuning.stop_controller import StopController
from csmae.tuning.strategy.base import Strategy
from csmae.workers.group import TRAINABLE_RESOURCES, WorkerGroupTrainable
from csmae.workers.spec import PRETRAIN, WorkerGroupSpec

TRAINABLE_RESTARTS = 2
"""How often Tune restarts a trial whose trainable's process died."""


def run_search(
    budget: Budget,
    allocation: Allocation,
    listener: Listener,
    pretrain: str = PRETRAIN,
    strategy: Strategy | None = None,
) -> SearchEnd:
    """Run trials until the study has all of them or must stop. Ray must be running.

    Args:
        budget: The study's budget, with its trial store.
        allocation: Resources of each worker, and how many trials fit at once.
        listener: Called with every event.
        pretrain: Module and name of the generator that trains, such as ``package.module:function``.
        strategy: By default the one that the study names.
    """
    trial_store, search = budget.trial_store, budget.trial_store.study.search
    searcher = StudySearcher(budget, listener, ConcurrencyLimit(search, allocation.max_concurrent), strategy)
    if reason := budget.reached_limit():
        search_end = SearchEnd(SearchOutcome.BUDGET_EXHAUSTED, reason)
    else:
        stop_controller = StopController(budget, searcher)
        with tune_dir(None if trial_store.remote else trial_store.folder) as folder, stop_controller.stop_on_signals():
            spec = WorkerGroupSpec(
                allocation=allocation,
                retries=search.retries,
                hang_timeout_s=seconds(search.hang_timeout),
                scratch_dir=folder,
                pretrain=pretrain,
                remote=trial_store.remote,
            )
            _make_tuner(spec, searcher, stop_controller).fit()
        search_end = _superseded(trial_store) or stop_controller.search_end
    return _finish(budget, searcher, search_end)


def _finish(budget: Budget, searcher: StudySearcher, search_end: SearchEnd) -> SearchEnd:
    """Record the used budget, cut short the trials that must not stay RUNNING, and return how the search ended."""
    with searcher.stop_on_database_error():
        budget.write()
        if search_end.outcome in (SearchOutcome.BUDGET_EXHAUSTED, SearchOutcome.ABORTED):
            searcher.cut_short_trials(search_end.reason)
    searcher.retention.finish()
    if search_end.outcome is SearchOutcome.SUPERSEDED:
        return search_end
    if searcher.search_end and searcher.search_end.outcome is SearchOutcome.STORAGE_FAILED:
        return searcher.search_end
    if search_end.outcome is SearchOutcome.COMPLETED and searcher.end_reason:
        return SearchEnd(SearchOutcome.COMPLETED, searcher.end_reason)
    return search_end


def _superseded(trial_store: TrialStore) -> SearchEnd | None:
    """Whether another driver took over the storage, which may be why workers could not continue."""
    try:
        if trial_store.remote:
            trial_store.remote.claim.check()
    except SupersededError as error:
        return SearchEnd(SearchOutcome.SUPERSEDED, str(error))
    except OSError:
        pass  # an object store that does not respond does not respond to the other driver either
    return None


@contextmanager
def tune_dir(shared_dir: Path | None) -> Iterator[str]:
    """Make a temporary folder for the files of Ray Tune and Ray Train; remove those that killed drivers left.

    Args:
        shared_dir: Folder that all nodes share; None uses each node's own temporary folder.
    """
    with ExitStack() as stack:
        if shared_dir is None:
            try:
                name = str(stack.enter_context(scratch("tune")))
            except OSError as error:
                raise unwritable_scratch(scratch_root(), error) from None
        else:
            for stale in shared_dir.glob("tune-*"):
                shutil.rmtree(stale, ignore_errors=True)
            try:
                name = stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-", dir=shared_dir))
            except OSError as error:
                raise ConfigError(describe_write_error(shared_dir, error)) from None
        yield name


def _make_tuner(spec: WorkerGroupSpec, searcher: StudySearcher, stop_controller: StopController) -> tune.Tuner:
    trainable = tune.with_parameters(WorkerGroupTrainable, spec=spec)
    return tune.Tuner(
        tune.with_resources(trainable, PlacementGroupFactory([TRAINABLE_RESOURCES])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=StrategyScheduler(searcher),
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=spec.scratch_dir,
            stop=stop_controller,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trainings write their own checkpoints
            failure_config=tune.FailureConfig(max_failures=TRAINABLE_RESTARTS),
            verbose=0,
        ),
    )
