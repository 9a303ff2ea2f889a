"""The commands ``doctor`` and ``preemption-notice``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from csmae.cli.options import Address, Assignments, ClusterAddress, MlflowUri, Storage, StudyFile
from csmae.config import ConfigError
from csmae.console.terminal import plain_console, print_line

if TYPE_CHECKING:
    from rich.table import Table

    from csmae.cluster.preflight import Check
    from csmae.study.study import Study


def doctor(
    study: StudyFile = None,
    assignments: Assignments = None,
    address: Address = None,
    storage: Storage = "runs",
    mlflow_uri: MlflowUri = None,
) -> int:
    """Check whether a search can run, here or on a cluster; the exit status is 1 if a check fails.

    With a study file, the archive and the resources for a trial are checked as well.
    """
    from csmae.cluster.preflight import check
    from csmae.storage.study_mirror import local_folder
    from csmae.study.study import load_study
    from csmae.tracking.destination import redacted, tracking_uri, unreachable

    definition = load_study(study, None, assignments or []) if study else None
    checks = _check_cluster(address, storage, definition)
    uri = tracking_uri(mlflow_uri, local_folder(storage))
    wrong = unreachable(uri)
    remedy = "start it there (`mlflow server`), or name another with --mlflow-uri"
    checks.append(check("MLflow", wrong, "" if wrong else f"{redacted(uri)} answers, or will be created", remedy))
    plain_console().print(_format_checks(checks))
    if definition is None:
        print_line("without a study file, neither an archive nor the resources for trials were checked")
    return int(any(each.remedy for each in checks))


def _check_cluster(address: str | None, storage: str, study: Study | None) -> list[Check]:
    """The checks that need Ray; one failed check if there is no Ray or no storage."""
    from csmae.cluster.node_report import report_nodes
    from csmae.cluster.preflight import advisory_checks, check, failed_check, placement_check, required_checks
    from csmae.cluster.resources import local_resources
    from csmae.cluster.session import ray_running
    from csmae.storage.study_mirror import shared_store

    resources = None if address else local_resources()
    checks: list[Check] = []
    try:
        shared = shared_store(storage)
    except ConfigError as error:
        return [failed_check("storage", error)]
    try:
        with ray_running(address, resources, verbose=False, insecure=True) as found:
            if address:
                wrong = None if found.requires_token else f"{found.where} requires no token"
                remedy = "start Ray with RAY_AUTH_MODE=token on all nodes (docs/explanation/security.md)"
                checks.append(check("authentication", wrong, f"{found.where} requires the token", remedy))
            report = report_nodes(shared, study.first_config().data if study else None)
            checks += [*required_checks(report), *advisory_checks(report)]
            if study:
                checks.append(placement_check(study.search, found))
    except ConfigError as error:
        checks.append(failed_check("Ray", error))
    return checks


def _format_checks(checks: list[Check]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in checks:
        text = f"{each.found}\n→ {each.remedy}" if each.remedy else each.found
        table.add_row("✗" if each.remedy else "✓", each.name, text)
    return table


def preemption_notice(
    cloud: Annotated[Literal["aws", "gcp"], typer.Argument(help="Cloud of this machine.")],
    address: ClusterAddress,
    node_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Ray's ID of the node. Default: this machine's node.")
    ] = None,
) -> int:
    """Wait for the cloud's preemption notice for this spot machine, and pass it on to Ray.

    Trials on this node then save their state and move to another one.
    """
    from csmae.cluster.preemption import forward_notice

    forward_notice(cloud, address, node_id)
    return 0
