"""The command ``doctor``: what would go wrong in a search, before it costs anything."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from csmae.config import ConfigError
from csmae.console.terminal import plain_console, print_line
from csmae.tracking.destination import redacted, tracking_uri, unreachable

if TYPE_CHECKING:
    from csmae.cluster.preflight import Check
    from csmae.study.study import Study


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this room's commands; each sets ``run``, which takes the parsed options and returns the exit code."""
    parser = subparsers.add_parser("doctor", help="look whether a search would run, here or on a cluster")
    add = parser.add_argument
    add(
        "study",
        type=Path,
        nargs="?",
        help="YAML file: its archive and the resources that a trial takes are looked at, too",
    )
    add("--address", help="of a Ray cluster, such as auto; default: this machine alone")
    add("--storage", default="runs", help="of all studies: a folder (default: runs), s3://BUCKET/… or gs://BUCKET/…")
    add("--mlflow-uri", help="default: MLFLOW_TRACKING_URI, or mlflow.db in the storage folder")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as of search.py")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from csmae.cluster.preflight import check  # Ray and torch take their time
    from csmae.storage.study_mirror import local
    from csmae.study.study import load_study

    study = load_study(options.study, None, options.set) if options.study else None
    checks = _of_ray(options, study)
    uri = tracking_uri(options.mlflow_uri, local(options.storage))
    start = "start it there (`mlflow server`), or name another with --mlflow-uri"
    wrong = unreachable(uri)
    checks.append(check("MLflow", wrong, "" if wrong else f"{redacted(uri)} answers, or will be made", start))
    plain_console().print(_table(checks))
    if study is None:
        print_line("no study named: neither its archive nor the resources for its trials was looked at")
    return int(any(it.remedy for it in checks))


def _of_ray(options: argparse.Namespace, study: Study | None) -> list[Check]:
    """All that is seen through Ray, and why no more."""
    from csmae.cluster.node_report import report_nodes
    from csmae.cluster.preflight import advisory_checks, check, failed_check, placement_check, required_checks
    from csmae.cluster.resources import local_resources
    from csmae.cluster.session import ray_running
    from csmae.storage.study_mirror import place

    resources = None if options.address else local_resources()
    checks: list[Check] = []
    try:
        storage = place(options.storage)
    except ConfigError as error:
        return [failed_check("storage", error)]
    try:
        with ray_running(options.address, resources, verbose=False, insecure=True) as found:
            if options.address:
                wrong = None if found.requires_token else f"{found.where} requires no token"
                start = "start Ray with RAY_AUTH_MODE=token on all nodes (docs/security.md)"
                checks.append(check("authentication", wrong, f"{found.where} requires the token", start))
            seen = report_nodes(storage, study.first().data if study else None)
            checks += [*required_checks(seen), *advisory_checks(seen)]
            if study:
                checks.append(placement_check(study.search, found))
    except ConfigError as error:
        checks.append(failed_check("Ray", error))
    return checks


def _table(checks: list[Check]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for it in checks:
        text = f"{it.found}\n→ {it.remedy}" if it.remedy else it.found
        table.add_row("✗" if it.remedy else "✓", it.name, text)
    return table
