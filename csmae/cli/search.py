"""The commands ``search``, its options and what they mean for a study, and ``schema``."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from csmae.cli.exit_status import INTERRUPTED
from csmae.cli.options import Address, Assignments, Logger, MlflowUri, Storage, StudyFile
from csmae.config import ConfigError
from csmae.console.terminal import print_line

BUDGET, RESOURCES, TRANSFER = "Budget", "Resources", "Transfer"
"""Panels of the help."""


def search(
    study: StudyFile = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the study. Default: the name of its file, without .yaml."),
    ] = None,
    assignments: Assignments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space and the cost of a trial, and exit.")
    ] = False,
    list_studies: Annotated[bool, typer.Option("--list", help="List the studies in the storage, and exit.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's own logs.")] = False,
    num_trials: Annotated[
        int | None, typer.Option(metavar="N", help="Trials of the whole study.", rich_help_panel=BUDGET)
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Time for the whole study, such as 90m or 12h; trials still running then end.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    gpu_hours: Annotated[
        float | None,
        typer.Option(
            metavar="HOURS",
            help="GPU hours for the whole study, summed over all GPUs; without GPUs, hours of CPU workers.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    workers_per_trial: Annotated[
        int | None, typer.Option(metavar="N", help="DDP workers that train one trial.", rich_help_panel=RESOURCES)
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="GPUs of one worker. Default: 1 if there are GPUs, otherwise 0.",
            rich_help_panel=RESOURCES,
        ),
    ] = None,
    accelerator_type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="GPU type to use in a cluster with several, such as A10G or H100.",
            rich_help_panel=RESOURCES,
        ),
    ] = None,
    address: Address = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Join a cluster that requires no token.", rich_help_panel=RESOURCES)
    ] = False,
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
    logger: Logger = "mlflow",
    fork: Annotated[
        str | None,
        typer.Option(
            metavar="NEW",
            help="Start a study named NEW with those trials of this study that still fit its file.",
            rich_help_panel=TRANSFER,
        ),
    ] = None,
    warm_start_from: Annotated[
        str | None,
        typer.Option(
            metavar="STUDY",
            help="Start with those trials of another study that fit, and with its best configurations.",
            rich_help_panel=TRANSFER,
        ),
    ] = None,
) -> int:
    """Run a hyperparameter search and register the best encoder.

    Without --address, it runs on this machine alone. Ctrl-C stops it cleanly; the same command resumes it.
    """
    if list_studies:
        from csmae.cli.explore import print_studies

        print_studies(storage)
        return 0
    if study is None:
        raise ConfigError("name a study file, such as spaces/quickstart.yaml (--list shows the studies there are)")
    if insecure and not address:
        raise ConfigError("--insecure applies only to a cluster: add --address")
    settings = {
        "num_trials": num_trials,
        "time_limit": time_limit,
        "gpu_hours": gpu_hours,
        "workers_per_trial": workers_per_trial,
        "gpus_per_worker": gpus_per_worker,
        "accelerator_type": accelerator_type,
    }
    overrides = [f"search.{name}={value}" for name, value in settings.items() if value is not None]
    from csmae.cli.explore import run, show_plan  # Ray, torch and Optuna take seconds
    from csmae.storage.study_mirror import local_folder
    from csmae.study.study import load_study
    from csmae.tracking.destination import tracking_uri
    from csmae.tracking.provenance import command

    try:
        checked = load_study(study, fork or name, [*(assignments or []), *overrides])
        uri = tracking_uri(mlflow_uri, local_folder(storage), logger)
        if dry_run:
            return show_plan(checked, uri, address)
        forked = (name or study.stem) if fork else None
        sources = [source for source in (forked, warm_start_from) if source]
        return run(checked, uri, storage, sources, address=address, insecure=insecure, verbose=verbose)
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; to resume: {command()}\n")
        return INTERRUPTED


def schema() -> int:
    """Print the JSON schema of a study file, for editors that complete and check YAML."""
    from csmae.study.schema import study_schema

    print_line(json.dumps(study_schema(), indent=2))
    return 0
