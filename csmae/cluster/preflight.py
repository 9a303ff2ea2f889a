"""Preflight checks: what must hold on all nodes before a search starts, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from ray.util.placement_group import placement_group, remove_placement_group

from csmae.cluster.node_report import ClusterReport, NodeReport
from csmae.cluster.resources import ClusterResources, allocate
from csmae.config import ConfigError
from csmae.study.options import Search

MIN_FREE_BYTES = 5 * 2**30
"""Free space that a disk needs for logs, checkpoints and encoders at the start."""

MAX_USED_RATIO = 0.95
"""Used share of a disk above which Ray schedules nothing on its node."""

MAX_CLOCK_OFFSET_S = 5.0
"""Clocks that differ by more make the times of trials and of MLflow incomparable."""

PLACEMENT_TIMEOUT_S = 30.0

INSTALL = "install constraints.txt and this program there again"


@dataclass(frozen=True)
class Check:
    """The result of a preflight check."""

    name: str
    found: str
    remedy: str = ""
    """What to do; empty for a check that passes."""


def check(name: str, error: str | None, found: str, remedy: str) -> Check:
    """A check that passes where there is no error."""
    return Check(name, error, remedy) if error else Check(name, found)


def failed_check(name: str, error: ConfigError) -> Check:
    """The failed check of an error, whose first line ends with what to do."""
    found, _, remedy = str(error).splitlines()[0].rpartition(": ")
    return Check(name, found, remedy)


def require(checks: Iterable[Check]) -> None:
    """Require that all checks pass.

    Raises:
        ConfigError: Some fail; a line for each.
    """
    if lines := [f"{it.name}: {it.found}: {it.remedy}" for it in checks if it.remedy]:
        raise ConfigError("\n".join(lines))


def required_checks(cluster: ClusterReport) -> Iterator[Check]:
    """Check what every search needs: all nodes report, run the same versions, share the storage and have the data."""
    missing = "; ".join(f"{node.name}: {node.error}" for node in cluster.nodes if node.report is None)
    yield check("nodes", missing, f"{len(cluster.nodes)} answer", INSTALL)
    own = ", ".join(f"{name} {version}" for name, version in cluster.driver.versions.items())
    yield check("versions", _errors(cluster, partial(_version_error, cluster.driver)), own, INSTALL)
    yield check(
        "storage",
        _errors(cluster, lambda report: report.storage_error),
        "every node writes, the driver reads",
        "name a folder that all nodes share and this account may write",
    )
    if cluster.driver.data or cluster.driver.data_error:
        error = cluster.driver.data_error or _errors(cluster, partial(_data_error, cluster.driver))
        yield check("data", error, str(cluster.driver.data), "put the same archive under the same path on every node")


def advisory_checks(cluster: ClusterReport) -> Iterator[Check]:
    """Check what causes trouble later: readable tokens, unused GPUs, full disks, clocks that differ."""
    reports = [node.report for node in cluster.nodes if node.report]
    modes = " and ".join(sorted({report.token_mode for report in reports}))
    create = "`ray get-auth-token --generate` on the head, copy it there, `chmod 600 ~/.ray/auth_token`"
    yield check("token", _errors(cluster, _token_error), f"present, {modes}", create)
    gpus = [gpu for report in reports for gpu in report.gpus]
    counts = ", ".join(f"{gpus.count(model)} x {model}" for model in sorted(set(gpus)))
    driver = "install NVIDIA's driver and the torch of constraints.txt, and restart Ray there"
    yield check("GPUs", _errors(cluster, _gpu_error), counts or "none", driver)
    free = min((free for report in reports for free, _ in report.disks.values()), default=0)
    yield check("disks", _errors(cluster, _disk_error), f"at least {free / 2**30:.0f} GiB free", "free some space")
    error = _errors(cluster, _clock_error)
    yield check("clocks", error, f"within {MAX_CLOCK_OFFSET_S:g} s", "let chrony or ntpd set the clock")


def placement_check(search: Search, resources: ClusterResources) -> Check:
    """Check that Ray can reserve the resources of one trial."""
    try:
        allocation = allocate(search, resources)
    except ConfigError as error:
        return failed_check("placement", error)
    group = placement_group([allocation.bundle] * allocation.workers_per_trial, strategy="PACK")
    try:
        reserved = group.wait(PLACEMENT_TIMEOUT_S)
    finally:
        remove_placement_group(group)
    trial = f"a trial of {allocation}"
    missing = None if reserved else f"the resources for {trial} were not free within {PLACEMENT_TIMEOUT_S:.0f} s"
    lower = "see who uses them (`ray status`), or lower --workers-per-trial or --gpus-per-worker"
    return check("placement", missing, f"{trial} fits, {allocation.max_concurrent} at a time", lower)


def _errors(cluster: ClusterReport, find_error: Callable[[NodeReport], str | None]) -> str:
    """The errors in the nodes' reports, each with its node's name."""
    errors = ((node.name, find_error(node.report)) for node in cluster.nodes if node.report)
    return "; ".join(f"{name}: {error}" for name, error in errors if error)


def _version_error(driver: NodeReport, report: NodeReport) -> str | None:
    different = [
        f"{name} {v}, here {driver.versions[name]}" for name, v in report.versions.items() if v != driver.versions[name]
    ]
    return "; ".join(different) or None


def _data_error(driver: NodeReport, report: NodeReport) -> str | None:
    if report.data_error:
        return report.data_error
    return None if report.data == driver.data else f"{report.data}; here {driver.data}"


def _token_error(report: NodeReport) -> str | None:
    if report.token_mode == "none":
        return "has none"
    private = report.token_mode in ("environment", "0600", "0400")
    return None if private else f"others may read it ({report.token_mode})"


def _gpu_error(report: NodeReport) -> str | None:
    if len(report.gpus) != report.ray_gpus:
        return f"Ray counts {report.ray_gpus}, nvidia-smi lists {len(report.gpus)}"
    return f"torch cannot use them: {report.cuda_error}" if report.cuda_error else None


def _disk_error(report: NodeReport) -> str | None:
    full = [
        f"{folder} has {free / 2**30:.1f} GiB free, {used:.0%} used"
        for folder, (free, used) in report.disks.items()
        if free < MIN_FREE_BYTES or used > MAX_USED_RATIO
    ]
    return "; ".join(full) or None


def _clock_error(report: NodeReport) -> str | None:
    if abs(report.clock_offset_s) < MAX_CLOCK_OFFSET_S:
        return None
    return f"{abs(report.clock_offset_s):.0f} s {'ahead' if report.clock_offset_s > 0 else 'behind'}"
