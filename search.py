"""Explore CSMAE pretrainings: ``python search.py spaces/quickstart.yaml``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ray.exceptions import RayError
from rich.console import Console

from csmae.config import Config, ConfigError
from csmae.settings import flatten
from csmae.tracking.provenance import command
from csmae.tracking.tracker import Tracker, shown
from csmae.tuning.champion import Candidate, candidates, score_all
from csmae.tuning.cluster import Share, ray_running, share, this_machine
from csmae.tuning.dry_run import describe
from csmae.tuning.events import Event, Reported, Started
from csmae.tuning.ledger import Ledger
from csmae.tuning.progress import Progress
from csmae.tuning.run import only_driver, run_search
from csmae.tuning.study import load_study
from csmae.tuning.view import View, scores_table, settings

INTERRUPTED = 130

UPLOAD_TIMEOUT_S = 60.0

DEFAULT_MLFLOW_URI = "sqlite:///runs/mlflow.db"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _search(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; to go on: {command()}", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="YAML file with base, space and search; see spaces/")
    parser.add_argument("--name", help="of the study (default: the file's); the same name goes on with it")
    parser.add_argument("--num-trials", type=int, metavar="N", help="trials of the whole study")
    parser.add_argument("--workers-per-trial", type=int, metavar="N", help="DDP workers that train one trial together")
    parser.add_argument("--gpus-per-worker", type=float, metavar="X", help="default: 1 where there are GPUs")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="folder of all studies (default: runs)")
    parser.add_argument("--mlflow-uri", help="default: MLFLOW_TRACKING_URI, or mlflow.db in the storage folder")
    parser.add_argument("--address", help="of a Ray cluster to join, such as auto; default: this machine alone")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="fix a field (optim.lr=1e-4) or change the search (search.sampler=random)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the space and what a trial costs, and stop")
    parser.add_argument("--verbose", action="store_true", help="let Ray speak")
    return parser


def _search(options: argparse.Namespace) -> int:
    console = Console(highlight=False)
    study = load_study(options.study, options.name, _assignments(options))
    from csmae.training.engine import check  # seconds of torch, which a mistake in the file need not wait for

    room = None if options.address else this_machine()
    if room:
        share(study.search, room)
    if options.dry_run:
        console.print(describe(study, room))
        return 0
    check(study.resolve(study.space.point(study.search.start_from[0] if study.search.start_from else {})))
    folder = options.storage.absolute() / study.name
    with only_driver(folder):
        ledger = Ledger(study, folder.parent)
        tracker = Tracker(folder, study.name, _mlflow_uri(options))
        try:
            with ray_running(options.address, room, options.verbose) as there:
                return _explore(options, ledger, tracker, share(study.search, there))
        finally:
            _close(tracker, console)


def _assignments(options: argparse.Namespace) -> list[str]:
    given = {name: getattr(options, name) for name in ("num_trials", "workers_per_trial", "gpus_per_worker")}
    named = [f"search.{name}={value}" for name, value in given.items() if value is not None]
    return [*options.set, *named]


def _mlflow_uri(options: argparse.Namespace) -> str:
    return options.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{options.storage}/mlflow.db"


def _explore(options: argparse.Namespace, ledger: Ledger, tracker: Tracker, part: Share) -> int:
    """Run the trials, then crown the champion."""
    console, study = Console(highlight=False), ledger.study
    folder = options.storage.absolute() / study.name
    tracker.start(dict(flatten(study.definition())), {}, study.search.objective, study.search.direction)
    progress = Progress.of(ledger)
    with View(study.name, progress, console) as view:

        def listen(event: Event) -> None:
            view(event)
            track(tracker, event)

        complete = run_search(ledger, folder, part, listen)
    if not complete:
        for trial in progress.running:
            tracker.end(trial.number, "RUNNING", "interrupted")
        console.print(f"stopped in order; to go on: {command()}", soft_wrap=True)
        return INTERRUPTED
    return _finish(options, ledger, tracker, part)


def track(tracker: Tracker, event: Event) -> None:
    """Tell MLflow's outbox what the search tells."""
    if isinstance(event, Started):
        tracker.trial(event.number, dict(event.values))
    elif isinstance(event, Reported):
        tracker.epoch(event.number, event.epoch, dict(event.metrics))
    else:
        tracker.end(event.number, event.state, event.reason)


def _finish(options: argparse.Namespace, ledger: Ledger, tracker: Tracker, part: Share) -> int:
    """Score, register and show the champion."""
    console = Console(highlight=False)
    folder = options.storage.absolute() / ledger.study.name
    found = candidates(ledger, folder)
    if not found:
        reasons = [str(trial.user_attrs.get("reason")) for trial in ledger.trials()[-1:]]
        console.print(f"no trial came to its end; the last one: {''.join(reasons)}", soft_wrap=True)
        return 1
    try:
        scores = score_all(found, part)
    except RayError as error:
        console.print(f"the published protocol could not be computed: {str(error).splitlines()[-1]}", soft_wrap=True)
        scores = [{} for _ in found]
    champion = found[-1]
    assert champion.trial is not None and champion.encoder_dir is not None
    tracker.champion(
        champion.trial.number,
        champion.encoder_dir,
        _saved_metrics(champion) | scores[-1],
        {"csmae.study": ledger.study.name, "csmae.data": _data_name(champion.config)},
    )
    summary = {f"scores/{c.name}/{name}": v for c, row in zip(found, scores, strict=True) for name, v in row.items()}
    tracker.finish(summary)
    if all(scores):
        console.print(scores_table({candidate.name: row for candidate, row in zip(found, scores, strict=True)}))
    from csmae.tracking.report import publish  # matplotlib takes its time

    publish(tracker, folder)
    _say_what_next(console, options, ledger.study.name, champion)
    return 0 if all(scores) else 1


def _saved_metrics(champion: Candidate) -> dict[str, float]:
    assert champion.encoder_dir is not None
    content = json.loads((champion.encoder_dir / "config.json").read_text(encoding="utf-8"))
    return dict(content["details"]["metrics"])


def _data_name(config: Config) -> str:
    data = config.data
    return f"synthetic {data.synthetic.model_dump_json()}" if data.path == "synthetic" else data.path


def _say_what_next(console: Console, options: argparse.Namespace, study: str, champion: Candidate) -> None:
    assert champion.trial is not None and champion.encoder_dir is not None
    console.print(f"champion: trial {champion.trial.number} with {settings(champion.trial.params)}", soft_wrap=True)
    console.print(f"encoder:  {champion.encoder_dir}", soft_wrap=True)
    console.print(f"report:   {champion.encoder_dir.parents[2] / 'report.html'}", soft_wrap=True)
    uri = shown(_mlflow_uri(options))
    console.print(f'load it:  csmae.load_encoder("models:/csmae-encoder@champion-{study}")', soft_wrap=True)
    if uri != DEFAULT_MLFLOW_URI:
        console.print(f"          with MLFLOW_TRACKING_URI={uri}", soft_wrap=True)
    page = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    console.print(f"compare:  {page}", soft_wrap=True)


def _close(tracker: Tracker, console: Console) -> None:
    left = tracker.close(UPLOAD_TIMEOUT_S)
    if left:
        console.print(f"MLflow does not have {left} events yet: they wait in the outbox for the next start")


if __name__ == "__main__":
    sys.exit(main())
