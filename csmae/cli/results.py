"""The commands ``export``, ``report`` and ``sync``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csmae.cli.exit_status import FAILED
from csmae.cli.options import Logger, MlflowUri, Storage, StudyName
from csmae.config import ConfigError
from csmae.console.terminal import print_line


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of an encoder, models:/… or runs:/…, or a *.ckpt of the published code beside its settings.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to create; it may exist if it is empty.")],
    title: Annotated[
        str | None, typer.Option(metavar="TITLE", help="Title of the model card. Default: the name of the folder.")
    ] = None,
    license_id: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="License of the weights, as a model hub names it. Default: none."),
    ] = None,
) -> int:
    """Write an encoder with a model card, as a folder for a model hub."""
    from csmae.reporting.export import export_encoder

    export_encoder(source, folder, title or folder.resolve().name, license_id)
    if not license_id:
        print_line(
            f"{folder}: the model card names no license; if the owner grants one, export again with --license ID"
        )
    return 0


def report(study: StudyName, storage: Storage = "runs") -> int:
    """Write a study's report: an HTML page and a Markdown summary, in the folder of the study."""
    from csmae.lock import describe_write_error
    from csmae.reporting.report import Report, write_report
    from csmae.storage.layout import DATABASE
    from csmae.storage.study_mirror import fetch_studies
    from csmae.trials.database import load_stored_study, report_database_errors

    folder = fetch_studies(storage)
    stored = load_stored_study(folder / DATABASE, study)
    with report_database_errors(folder / DATABASE):
        content = Report(stored, folder / study)
    try:
        page, summary, *_ = write_report(content)
    except OSError as error:
        raise ConfigError(describe_write_error(error.filename or content.folder, error)) from None
    print_line(f"{page} and {summary}")
    return 0


def sync(
    study: StudyName,
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
    logger: Logger = "mlflow",
    send_all: Annotated[
        bool, typer.Option("--all", help="Upload all events again, for example after a run was deleted and restored.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time for uploading.")] = 600,
) -> int:
    """Upload the events of a study that have not reached MLflow yet; the exit status is 1 if some remain."""
    from csmae.storage.study_mirror import local_folder
    from csmae.tracking.destination import redacted, tracking_uri
    from csmae.tracking.tracker import upload

    folder = local_folder(storage)
    uri = tracking_uri(mlflow_uri, folder, logger)
    num_unsent, rejected = upload(folder / study, uri, timeout, send_all)
    destination = redacted(uri)
    for text in rejected:
        print_line(f"rejected: {text}")
    if num_unsent:
        print_line(f"{num_unsent} events of {study} are not uploaded yet to {destination}")
    elif rejected:
        print_line(f"{study} is incomplete in {destination}; the next sync retries rejected events")
    else:
        print_line(f"{study} is complete in {destination}")
    return FAILED if num_unsent or rejected else 0
