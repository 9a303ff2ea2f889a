"""Commands of this room: ``sync`` uploads what a study's outbox still holds, ``report`` writes its report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from csmae.console.terminal import print_line
from csmae.reporting.record import Ranking
from csmae.tracking.destination import redacted, tracking_uri
from csmae.tracking.tracker import upload


def add_commands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    ranking_of: Callable[[Path], Ranking | None] = lambda folder: None,
) -> None:
    """Add this room's commands; each sets ``run``, which takes the parsed options and returns the exit code.

    Args:
        subparsers: Where to.
        ranking_of: Reads from a study's folder how its trials stand in the trial store.
    """
    sync = subparsers.add_parser("sync", help="upload what a study's outbox still holds")
    sync.add_argument("--mlflow-uri", help="default: MLFLOW_TRACKING_URI, or mlflow.db in that folder")
    sync.add_argument(
        "--logger", choices=["mlflow", "wandb"], default="mlflow", help="wandb: --mlflow-uri is a project"
    )
    sync.add_argument("--all", action="store_true", help="send everything again, as after a run was restored")
    sync.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds to try for (default: 600)")
    sync.set_defaults(run=_sync)
    report = subparsers.add_parser("report", help="write a study's report: one HTML page and a Markdown summary")
    report.set_defaults(run=partial(_report, ranking_of))
    for parser in (sync, report):
        parser.add_argument("study", help="name of the study")
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the studies (default: runs)")


def _sync(options: argparse.Namespace) -> int:
    uri = tracking_uri(options.mlflow_uri, options.runs, options.logger)
    num_unsent, rejected = upload(options.runs / options.study, uri, options.timeout, options.all)
    destination = redacted(uri)
    for text in rejected:
        print_line(f"rejected: {text}")
    if num_unsent:
        print_line(f"{num_unsent} events of {options.study} are not uploaded yet to {destination}")
    elif rejected:
        print_line(f"{options.study} is incomplete in {destination}; the next sync retries rejected events")
    else:
        print_line(f"{options.study} is complete in {destination}")
    return 1 if num_unsent or rejected else 0


def _report(ranking_of: Callable[[Path], Ranking | None], options: argparse.Namespace) -> int:
    from csmae.reporting.report import write_report  # matplotlib takes its time

    folder = options.runs / options.study
    page, summary, *_ = write_report(folder, ranking_of(folder))
    print_line(f"{page} and {summary}")
    return 0
