"""The command ``search`` at work, in the driver: it checks the study, opens what the trials need and runs them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from csmae.cli.exit_status import FAILED, INTERRUPTED
from csmae.cli.finish import finish
from csmae.cluster.node_report import report_nodes
from csmae.cluster.preflight import require, required_checks
from csmae.cluster.resources import Allocation, ClusterResources, allocate, local_resources
from csmae.cluster.session import ray_running
from csmae.config import ConfigError
from csmae.console.dry_run import format_dry_run
from csmae.console.live_view import LiveView
from csmae.console.progress import SearchProgress
from csmae.console.tables import format_studies
from csmae.console.terminal import plain_console, print_line, print_table
from csmae.lock import driver_lock
from csmae.settings import flatten
from csmae.storage.layout import DATABASE
from csmae.storage.manifest import RemoteStorage
from csmae.storage.study_mirror import driver_storage, fetch_studies, local_folder, shared_store
from csmae.study.metrics import LABEL_SCORES
from csmae.study.study import Study
from csmae.tracking.destination import check_uri
from csmae.tracking.provenance import command, provenance
from csmae.tracking.tracker import Tracker
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.projection import compare_data
from csmae.trials.store import TrialStore
from csmae.trials.transfer import describe_transfer, load_source_study, transfer_trials
from csmae.trials.trial import num_epochs, status_of, trained_params
from csmae.tuning.driver import run_search
from csmae.tuning.events import EpochReported, SearchEvent, SearchOutcome, TrialEnded, TrialStarted
from csmae.tuning.settings_warnings import settings_warnings
from csmae.tuning.stop_controller import raise_on_termination

UPLOAD_TIMEOUT_S = 60.0

NUM_LABELED = 64
"""Validation scenes to read; at least one of them has a label if the archive has labels."""


def print_studies(storage: str) -> None:
    """Print a table of the studies in a storage."""
    print_table(format_studies(fetch_studies(storage) / DATABASE))


def show_plan(study: Study, uri: str, address: str | None) -> int:
    """Print the space and the cost of a trial; returns the exit status.

    Raises:
        ConfigError: The tracking URI cannot be used, or a trial does not fit on this machine.
    """
    print_line(format_dry_run(study, _check_resources(study, uri, address)))
    return 0


def run(
    study: Study,
    uri: str,
    storage: str,
    source_studies: list[str],
    *,
    address: str | None,
    insecure: bool,
    verbose: bool,
) -> int:
    """Run or resume a search; returns the exit status.

    Args:
        study: The study.
        uri: Tracking URI.
        storage: Folder or URL of the bucket of all studies.
        source_studies: Names of the studies whose trials a new study starts from.
        address: Of the Ray cluster to join; None runs the search on this machine alone.
        insecure: Join a cluster that requires no token.
        verbose: Show Ray's own logs.

    Raises:
        ConfigError: The study, its data, the storage or the cluster cannot be used.
    """
    resources = _check_resources(study, uri, address)
    _check_data(study)
    for warning in settings_warnings(study):
        print_line(f"note: {warning}")
    folder = local_folder(storage).absolute()
    with driver_storage(storage) as remote, driver_lock(folder / study.name):
        trial_store = _open_trial_store(study, folder, remote, source_studies)
        if trial_store.shorter_epochs:
            print_line(f"note: {_describe_growth(trial_store, trial_store.shorter_epochs)}")
        tracker = Tracker(trial_store.folder, study.name, uri)
        try:
            with ray_running(address, resources, verbose, insecure) as found, raise_on_termination():
                if address:
                    store = remote.store if remote else shared_store(storage)
                    require(required_checks(report_nodes(store, study.first_config().data)))
                return _explore(trial_store, tracker, _allocate(study, found))
        finally:
            _close(tracker)


def _check_resources(study: Study, uri: str, address: str | None) -> ClusterResources | None:
    """Check the tracking URI; returns this machine's resources unless the search joins a cluster."""
    check_uri(uri)
    resources = None if address else local_resources()
    if resources:
        _allocate(study, resources)
    return resources


def _allocate(study: Study, resources: ClusterResources) -> Allocation:
    """Divide the resources among trials.

    Raises:
        ConfigError: Not even one trial fits, or not two with ``strategy: pbt``.
    """
    allocation = allocate(study.search, resources)
    if study.search.strategy == "pbt" and allocation.max_concurrent < 2:
        raise ConfigError(
            f"search.strategy pbt trains at least two trials at once, and {resources.where} has the resources for one of {allocation}: "
            "lower --workers-per-trial or --gpus-per-worker, or use another strategy"
        )
    return allocation


def _check_data(study: Study) -> None:
    # Importing torch takes seconds; a mistake in the file is reported before.
    from csmae.training.splits import validate_run, validation_split

    config = study.first_config()
    validation = validation_split(validate_run(config), config)
    labeled = [name for name in (*study.search.objectives, *study.search.constraints) if name in LABEL_SCORES]
    if labeled and not validation.take(range(min(NUM_LABELED, len(validation)))).labels().any():
        raise ConfigError(
            f"{config.data.path}: holds no labels, which {labeled[0]} needs: use search.objectives "
            "{val/recall_at_1: maximize}, which needs none"
        )


def _open_trial_store(
    study: Study, folder: Path, remote: RemoteStorage | None, source_studies: list[str]
) -> TrialStore:
    """Open the trial store and transfer from its source studies, from those with the most similar archive first."""
    sources = [load_source_study(folder / DATABASE, name, study) for name in source_studies]
    trial_store = TrialStore(study, folder, remote)
    for name in trial_store.sources:
        try:
            sources.append(load_source_study(folder / DATABASE, name, study))
        except ConfigError as error:  # the study file changed so much that no trial of the earlier definition fits
            print_line(str(error))
            trial_store.drop_source(name)
    for source in sorted(sources, key=lambda source: -compare_data(source, study).value):
        print_line(describe_transfer(source, study, transfer_trials(trial_store, source)))
    return trial_store


def _describe_growth(trial_store: TrialStore, before: int) -> str:
    """Say how the trials continue whose ``train.epochs`` was ``before``; the one that is furthest into its decay decides."""
    from csmae.training.optim import describe_growth

    study = trial_store.study
    furthest = (study.resolve({}).optim, 0)
    for trial in trial_store.trials():
        if status_of(trial) in (TrialStatus.RUNNING, TrialStatus.PAUSED):
            with suppress(ConfigError):  # the search's present settings do not allow the configuration
                found = study.resolve(trained_params(trial)).optim, num_epochs(trial)
                furthest = max(furthest, found, key=lambda pair: pair[1] - pair[0].epochs_before_decay(before))
    optim, epochs = furthest
    return describe_growth(before, optim, study.max_epochs, epochs)


def _explore(trial_store: TrialStore, tracker: Tracker, allocation: Allocation) -> int:
    """Run the trials, then register the champion."""
    study, budget = trial_store.study, Budget(trial_store, allocation.gpus_per_worker)
    tags = provenance() | {"csmae.tracking": tracker.destination}
    trial_store.record_provenance(tags)
    tracker.start(dict(flatten(study.definition())), tags, *next(iter(study.search.objectives.items())))
    progress = SearchProgress(budget)
    with LiveView(progress, plain_console()) as view:

        def listen(event: SearchEvent) -> None:
            view(event)
            track(tracker, event)

        search_end = run_search(budget, allocation, listen)
    if search_end.outcome is SearchOutcome.SUPERSEDED:
        print_line(f"{search_end.reason}: this search stops")
        return FAILED
    for trial in progress.running:
        tracker.end(trial.number, TrialStatus.RUNNING, search_end.reason or "interrupted")
    if search_end.outcome in (SearchOutcome.INTERRUPTED, SearchOutcome.STORAGE_FAILED):
        print_line(f"{search_end.reason or 'stopped cleanly'}; to resume: {command()}")
        return FAILED if search_end.reason else INTERRUPTED
    if search_end.reason:
        print_line(f"ended early: {search_end.reason}")
    return 0 if finish(trial_store, tracker, allocation) else FAILED


def track(tracker: Tracker, event: SearchEvent) -> None:
    """Forward an event of the search to the tracker."""
    if isinstance(event, TrialStarted):
        tracker.trial(event.number, dict(event.values))
    elif isinstance(event, EpochReported):
        tracker.epoch(event.number, event.epoch, dict(event.metrics))
    elif isinstance(event, TrialEnded):
        tags = {} if event.confirms is None else {"csmae.confirms": str(event.confirms)}
        if event.violated_constraints:
            tags["csmae.violated_constraints"] = ", ".join(event.violated_constraints)
        tracker.end(event.number, event.status, event.reason, tags)


def _close(tracker: Tracker) -> None:
    num_pending = tracker.close(UPLOAD_TIMEOUT_S)
    if num_pending:
        print_line(f"{num_pending} events are not yet uploaded to {tracker.destination}; the next run sends them")
    for text in tracker.rejected:
        print_line(f"{tracker.destination} rejected: {text}")
