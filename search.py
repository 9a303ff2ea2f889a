"""Explore CSMAE pretrainings: ``python search.py spaces/quickstart.yaml``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import RayError

from csmae.cluster.node_report import report_nodes
from csmae.cluster.preflight import require, required_checks
from csmae.cluster.reserved import NoResourcesError
from csmae.cluster.resources import Allocation, allocate, local_resources
from csmae.cluster.session import ray_running
from csmae.config import ConfigError
from csmae.console.dry_run import format_dry_run
from csmae.console.format import format_settings
from csmae.console.live_view import LiveView
from csmae.console.progress import SearchProgress
from csmae.console.tables import format_best_trials, format_importances, format_scores, format_studies
from csmae.console.terminal import plain_console, print_line, tolerate_closed_terminal, tolerate_encoding_errors
from csmae.data.archive_name import data_name
from csmae.lock import only_driver
from csmae.settings import flatten
from csmae.storage.layout import DATABASE
from csmae.storage.study_mirror import fetched, local, opened
from csmae.study.metrics import LABEL_SCORES
from csmae.study.study import Study, load_study
from csmae.tracking.destination import WANDB, check_uri, redacted, tracking_uri
from csmae.tracking.provenance import command, provenance
from csmae.tracking.registry import MODEL, study_alias
from csmae.tracking.tracker import Tracker
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.importance import importances
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from csmae.tuning.champion import EncoderToScore, download_trials, encoders_to_score, saved_metrics, score_encoders
from csmae.tuning.driver import run_search
from csmae.tuning.events import EpochReported, Event, SearchEnd, SearchOutcome, TrialEnded, TrialStarted
from csmae.tuning.settings_warnings import settings_warnings
from csmae.tuning.stop_controller import raise_on_termination

FAILED, REFUSED, INTERRUPTED = 1, 2, 130

UPLOAD_TIMEOUT_S = 60.0

DEFAULT_MLFLOW_URI = "sqlite:///runs/mlflow.db"

NUM_LABELLED = 64
"""Validation scenes of which one has a label where an archive has labels."""

SEARCH_OPTIONS = ("num_trials", "workers_per_trial", "gpus_per_worker", "accelerator_type", "time_limit", "gpu_hours")
"""Options that stand for ``--set search.…``."""


@tolerate_encoding_errors()
@tolerate_closed_terminal()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            plain_console().print(format_studies(fetched(options.storage) / DATABASE))
            return 0
        return _search(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"stopped; to resume: {command()}", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("study", type=Path, nargs="?", help="YAML file with base, space and search; see spaces/")
    add("--name", help="of the study (default: the file's); the same name goes on with it")
    add("--num-trials", type=int, metavar="N", help="trials of the whole study")
    add("--time-limit", metavar="T", help="for the whole study, such as 90m or 12h; then running trials end")
    add("--gpu-hours", type=float, metavar="X", help="for the whole study: hours of all GPUs, or of CPU workers")
    add("--workers-per-trial", type=int, metavar="N", help="DDP workers that train one trial together")
    add("--gpus-per-worker", type=float, metavar="X", help="default: 1 where there are GPUs")
    add("--accelerator-type", metavar="T", help="of the GPUs where a cluster has several, such as A10G or H100")
    add("--storage", default="runs", help="of all studies: a folder (default: runs), s3://BUCKET/… or gs://BUCKET/…")
    add("--mlflow-uri", help="default: MLFLOW_TRACKING_URI, or mlflow.db in the storage folder")
    add("--logger", choices=("mlflow", "wandb"), default="mlflow", help="wandb: --mlflow-uri names the project")
    add("--address", help="of a Ray cluster to join, such as auto; default: this machine alone")
    add("--insecure", action="store_true", help="join a cluster that asks nobody for a token")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="such as optim.lr=1e-4, search.sampler=gp")
    add("--fork", metavar="NEW", help="begin a study of this name with what still fits from the one before")
    add("--warm-start-from", metavar="STUDY", help="begin with what fits from another study")
    add("--dry-run", action="store_true", help="show the space and what a trial costs, and stop")
    add("--list", action="store_true", help="show the studies in the storage folder, and stop")
    add("--verbose", action="store_true", help="show Ray's own logs")
    return parser


def _search(options: argparse.Namespace) -> int:
    if options.study is None:
        raise ConfigError("name a study file, such as spaces/quickstart.yaml (--list shows the studies there are)")
    if options.insecure and not options.address:
        raise ConfigError("--insecure applies only to a cluster: add --address")
    study = load_study(options.study, options.fork or options.name, _assignments(options))
    check_uri(_uri(options))
    resources = None if options.address else local_resources()
    if resources:
        allocate(study.search, resources)
    if options.dry_run:
        print_line(format_dry_run(study, resources))
        return 0
    folder = local(options.storage).absolute()
    _check_data(study)
    for note in settings_warnings(study):
        print_line(f"note: {note}")
    with opened(options.storage) as files, only_driver(folder / study.name):
        ancestors = [load_source_study(folder / DATABASE, name, study) for name in _ancestors(options)]
        trial_store = TrialStore(study, folder, files)
        for name in trial_store.sources:
            try:
                ancestors.append(load_source_study(folder / DATABASE, name, study))
            except ConfigError as error:  # the change of the file that made the study anew leaves nothing to take over
                print_line(str(error))
                trial_store.drop_source(name)
        for old in ancestors:
            print_line(f"{transfer_trials(trial_store, old)} trials of study {old.study_name} taken over")
        tracker = Tracker(trial_store.folder, study.name, _uri(options))
        try:
            with (
                ray_running(options.address, resources, options.verbose, options.insecure) as there,
                raise_on_termination(),
            ):
                if options.address:
                    require(required_checks(report_nodes(files.bucket if files else folder, study.first().data)))
                return _explore(options, trial_store, tracker, allocate(study.search, there))
        finally:
            _close(tracker)


def _assignments(options: argparse.Namespace) -> list[str]:
    given = {name: getattr(options, name) for name in SEARCH_OPTIONS}
    return [*options.set, *(f"search.{name}={value}" for name, value in given.items() if value is not None)]


def _check_data(study: Study) -> None:
    from csmae.training.scoring import validation_split
    from csmae.training.trainer import check  # seconds of torch, which a mistake in the file need not wait for

    config = study.first()
    validation = validation_split(check(config), config)
    wanted = [name for name in (*study.search.objectives, *study.search.constraints) if name in LABEL_SCORES]
    if wanted and not validation.take(range(min(NUM_LABELLED, len(validation)))).labels().any():
        raise ConfigError(
            f"{config.data.path}: holds no labels, which {wanted[0]} needs: use search.objectives "
            "{val/recall_at_1: maximize}, which needs none"
        )


def _ancestors(options: argparse.Namespace) -> list[str]:
    forked = (options.name or options.study.stem) if options.fork else None
    return [name for name in (forked, options.warm_start_from) if name]


def _uri(options: argparse.Namespace) -> str:
    return tracking_uri(options.mlflow_uri, local(options.storage), options.logger)


def _explore(options: argparse.Namespace, trial_store: TrialStore, tracker: Tracker, allocation: Allocation) -> int:
    """Run the trials, then crown the champion."""
    study, budget = trial_store.study, Budget(trial_store, allocation.gpus_per_worker)
    tracker.start(
        dict(flatten(study.definition())),
        provenance() | {"csmae.tracking": tracker.destination},
        *next(iter(study.search.objectives.items())),
    )
    progress = SearchProgress.from_budget(budget)
    with LiveView(study.name, progress, plain_console()) as view:

        def listen(event: Event) -> None:
            view(event)
            track(tracker, event)

        ending = run_search(budget, allocation, listen)
    if ending.outcome is SearchOutcome.SUPERSEDED:
        print_line(f"{ending.reason}: this search stops")
        return FAILED
    for trial in progress.running:
        tracker.end(trial.number, TrialStatus.RUNNING, ending.reason or "interrupted")
    if ending.outcome in (SearchOutcome.INTERRUPTED, SearchOutcome.STORAGE_FAILED):
        print_line(f"{ending.reason or 'stopped cleanly'}; to resume: {command()}")
        return FAILED if ending.reason else INTERRUPTED
    return _finish(options, trial_store, tracker, allocation, ending)


def track(tracker: Tracker, event: Event) -> None:
    """Tell MLflow's outbox what the search tells."""
    if isinstance(event, TrialStarted):
        tracker.trial(event.number, dict(event.values))
    elif isinstance(event, EpochReported):
        tracker.epoch(event.number, event.epoch, dict(event.metrics))
    elif isinstance(event, TrialEnded):
        tags = {} if event.confirms is None else {"csmae.confirms": str(event.confirms)}
        tags |= (
            {"csmae.violated_constraints": ", ".join(event.violated_constraints)} if event.violated_constraints else {}
        )
        tracker.end(event.number, event.state, event.reason, tags)


def _finish(
    options: argparse.Namespace, trial_store: TrialStore, tracker: Tracker, allocation: Allocation, ending: SearchEnd
) -> int:
    """Score, register and show the champion."""
    if ending.reason:
        print_line(f"ended early: {ending.reason}")
    download_trials(trial_store)
    found = encoders_to_score(trial_store)
    if not found:
        print_line(f"no champion: {_last_reason(trial_store)}")
        return FAILED
    try:
        scores = score_encoders(found, allocation, trial_store.files, print_line)
    except (RayError, NoResourcesError) as error:
        print_line(f"the published protocol could not be computed: {str(error).splitlines()[-1]}")
        scores = [{} for _ in found]
    _register_champion(tracker, trial_store, found, scores)
    from csmae.reporting.report import publish  # matplotlib takes its time

    publish(tracker, trial_store.folder, leaderboard(trial_store.optuna_study))
    if all(scores):
        plain_console().print(
            format_scores({candidate.name: row for candidate, row in zip(found, scores, strict=True)})
        )
    plain_console().print(format_best_trials(trial_store))
    for line in format_importances(trial_store):
        print_line(line)
    _say_what_next(options, trial_store, found[-1])
    return 0 if all(scores) else FAILED


def _last_reason(trial_store: TrialStore) -> str:
    reasons = [str(trial.user_attrs["reason"]) for trial in trial_store.trials() if "reason" in trial.user_attrs]
    return f"no trial came to its end; the last one: {reasons[-1]}" if reasons else "no trial came to its end"


def _register_champion(
    tracker: Tracker, trial_store: TrialStore, found: list[EncoderToScore], scores: list[dict[str, float]]
) -> None:
    """Register the champion's encoder with its scores, and tell the study's figures."""
    champion = found[-1]
    assert champion.trial is not None and champion.encoder_dir is not None
    board = leaderboard(trial_store.optuna_study)
    best = next(standing for standing in board.entries if standing.trial.number == champion.trial.number)
    if best is not board.entries[0]:
        first = board.entries[0].trial.number
        print_line(
            f"trial {first} is best, but {trial_store.encoder_dir(first)} no longer exists: using trial {best.trial.number}"
        )
    confirmed = {"confirm/mean": best.mean, "confirm/spread": best.spread} if best.num_seeds > 1 else {}
    tags = {"csmae.study": trial_store.study.name, "csmae.data": data_name(champion.config.data)}
    for standing in board.entries[: trial_store.study.search.keep]:
        number, folder = standing.trial.number, trial_store.encoder_dir(standing.trial.number)
        if number != champion.trial.number and folder.exists():
            tracker.encoder(number, folder, saved_metrics(folder), tags)
    metrics = saved_metrics(champion.encoder_dir) | scores[-1] | confirmed
    tags["csmae.seeds"] = str(best.num_seeds)
    tracker.champion(champion.trial.number, champion.encoder_dir, metrics, tags, best.mean)
    trial_store.record_champion(best.trial.number, best.mean, best.num_seeds)
    summary = {f"scores/{c.name}/{name}": v for c, row in zip(found, scores, strict=True) for name, v in row.items()}
    shares = {f"importance/{name}": share for name, share in importances(trial_store).items()}
    tracker.finish(summary | shares | confirmed)


def _say_what_next(options: argparse.Namespace, trial_store: TrialStore, champion: EncoderToScore) -> None:
    assert champion.trial is not None and champion.encoder_dir is not None
    print_line(f"champion: trial {champion.trial.number} with {format_settings(trial_store.params(champion.trial))}")
    print_line(f"encoder:  {champion.encoder_dir}")
    print_line(f"report:   {trial_store.folder / 'report.html'}")
    for line in advice(redacted(_uri(options)), trial_store.folder, champion.encoder_dir):
        print_line(line)
    again = re.sub(r" --num-trials[ =]\S+", "", command())
    print_line(f"extend:   {again} --num-trials N")


def advice(uri: str, folder: Path, encoder_dir: Path) -> Iterator[str]:
    """How to load the champion and to compare the trials, where the study's events go to ``uri``."""
    if uri.startswith(WANDB):
        yield f"load it:  csmae.load_encoder({json.dumps(str(encoder_dir), ensure_ascii=False)})"
        yield f"compare:  project {uri.removeprefix(WANDB)} of Weights & Biases, group {folder.name}"
        if os.environ.get("WANDB_MODE") == "offline":
            yield f"send:     wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"
        return
    name = f"models:/{MODEL}@{study_alias(folder.name)}"
    yield f"load it:  csmae.load_encoder({json.dumps(name, ensure_ascii=False)})"
    if uri != DEFAULT_MLFLOW_URI:
        yield f"          with MLFLOW_TRACKING_URI={shlex.quote(uri)}"
    yield f"compare:  {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {shlex.quote(uri)}'}"


def _close(tracker: Tracker) -> None:
    left = tracker.close(UPLOAD_TIMEOUT_S)
    if left:
        print_line(f"{left} events are not yet uploaded to {tracker.destination}; the next run sends them")
    for text in tracker.rejected:
        print_line(f"{tracker.destination} rejected: {text}")


if __name__ == "__main__":
    sys.exit(main())
