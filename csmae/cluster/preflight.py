"""What must hold on all nodes before a search begins, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from ray.util.placement_group import placement_group, remove_placement_group

from csmae.cluster.node_report import ClusterReport, Node, NodeReport
from csmae.cluster.session import ACCELERATOR, KIND_UNIT, ClusterResources, allocate
from csmae.config import ConfigError
from csmae.study.options import Search

FREE_BYTES = 5 * 2**30
"""Of a disk, so that logs, checkpoints and encoders have room to begin with."""

FULL = 0.95
"""Allocation of a disk above which Ray gives it no more work."""

CLOCKS_S = 5.0
"""Between clocks: times of trials and of MLflow would not compare."""

PLACE_S = 30.0

INSTALL = "install constraints.txt and this program there anew"


@dataclass(frozen=True)
class Check:
    """A thing that was looked at."""

    name: str
    found: str
    remedy: str = ""
    """What to do; empty where all is well."""


def check(name: str, wrong: str | None, well: str, remedy: str) -> Check:
    """A check that is well where nothing is wrong."""
    return Check(name, wrong, remedy) if wrong else Check(name, well)


def require(checks: Iterable[Check]) -> None:
    """Refuse what is not well.

    Raises:
        ConfigError: One line a check.
    """
    if lines := [f"{it.name}: {it.found}: {it.remedy}" for it in checks if it.remedy]:
        raise ConfigError("\n".join(lines))


def required_checks(seen: ClusterReport) -> Iterator[Check]:
    """What no search can do without: every node answers, runs the same, shares the storage and has the data."""
    silent = "; ".join(f"{node.name}: {node.trouble}" for node in seen.nodes if node.facts is None)
    yield check("nodes", silent, f"{len(seen.nodes)} answer", INSTALL)
    own = ", ".join(f"{name} {version}" for name, version in seen.driver.versions.items())
    yield check("versions", _wrong(seen, partial(_other_versions, seen.driver)), own, INSTALL)
    yield check(
        "storage",
        _wrong(seen, lambda facts: facts.storage),
        "every node writes, the driver reads",
        "name a folder that all nodes share and this account may write",
    )
    if seen.driver.data or seen.driver.data_trouble:
        wrong = seen.driver.data_trouble or _wrong(seen, partial(_other_data, seen.driver))
        yield check("data", wrong, str(seen.driver.data), "put the same archive under the same path on every node")


def advisory_checks(seen: ClusterReport) -> Iterator[Check]:
    """What makes trouble later: tokens that others read, GPUs that nobody uses, full disks, clocks that differ."""
    modes = " and ".join(sorted({facts.token for facts in _facts(seen)}))
    give = "`ray get-auth-token --generate` on the head, copy it there, `chmod 600 ~/.ray/auth_token`"
    yield check("token", _wrong(seen, _open_token), f"there, {modes}", give)
    gpus = [gpu for facts in _facts(seen) for gpu in facts.gpus]
    kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in sorted(set(gpus)))
    drivers = "install NVIDIA's driver and the torch of constraints.txt, and start Ray there again"
    yield check("GPUs", _join(seen, _idle_gpus), kinds or "none", drivers)
    free = min((free for facts in _facts(seen) for free, _ in facts.disks.values()), default=0)
    yield check("disks", _wrong(seen, _full_disk), f"at least {free / 2**30:.0f} GiB free", "make room there")
    yield check("clocks", _join(seen, _other_time), f"within {CLOCKS_S:g} s", "let chrony or ntpd set the clock")


def placement(search: Search, resources: ClusterResources) -> Check:
    """Reserve what one trial takes, and give it back."""
    try:
        allocation = allocate(search, resources)
    except ConfigError as error:
        return from_error("placement", error)
    gpus = {"GPU": allocation.gpus_per_worker} if allocation.gpus_per_worker else {}
    kind = {f"{ACCELERATOR}{allocation.accelerator_type}": KIND_UNIT} if allocation.accelerator_type else {}
    group = placement_group(
        [{"CPU": allocation.cpus_per_worker} | gpus | kind] * search.workers_per_trial, strategy="PACK"
    )
    try:
        fits = group.wait(PLACE_S)
    finally:
        remove_placement_group(group)
    each = f"{allocation.cpus_per_worker:g} CPU" + (f" and {allocation.gpus_per_worker:g} GPU" if gpus else "")
    size = f"a trial of {search.workers_per_trial} x {each}"
    wrong = None if fits else f"{size} finds no room within {PLACE_S:.0f} s"
    lower = "see who has it (`ray status`), or lower --workers-per-trial or --gpus-per-worker"
    return check("placement", wrong, f"{size} fits, {allocation.max_concurrent} at a time", lower)


def from_error(name: str, error: ConfigError) -> Check:
    """An error's line, which ends with what to do."""
    what, _, remedy = str(error).splitlines()[0].rpartition(": ")
    return Check(name, what, remedy)


def _facts(seen: ClusterReport) -> list[NodeReport]:
    return [node.facts for node in seen.nodes if node.facts]


def _wrong(seen: ClusterReport, trouble: Callable[[NodeReport], str | None]) -> str:
    """What is wrong, node by node."""
    return _join(seen, lambda node: trouble(node.facts) if node.facts else None)


def _join(seen: ClusterReport, trouble: Callable[[Node], str | None]) -> str:
    texts = ((node.name, trouble(node)) for node in seen.nodes)
    return "; ".join(f"{name}: {text}" for name, text in texts if text)


def _other_versions(driver: NodeReport, facts: NodeReport) -> str | None:
    other = [
        f"{name} {v}, here {driver.versions[name]}" for name, v in facts.versions.items() if v != driver.versions[name]
    ]
    return "; ".join(other) or None


def _other_data(driver: NodeReport, facts: NodeReport) -> str | None:
    if facts.data_trouble:
        return facts.data_trouble
    return None if facts.data == driver.data else f"{facts.data}; here {driver.data}"


def _open_token(facts: NodeReport) -> str | None:
    if facts.token == "none":
        return "there is none"
    return None if facts.token in ("environment", "0600", "0400") else f"others may read it ({facts.token})"


def _idle_gpus(node: Node) -> str | None:
    if node.facts is None:
        return None
    if len(node.facts.gpus) != node.ray_gpus:
        return f"Ray hands out {node.ray_gpus}, nvidia-smi lists {len(node.facts.gpus)}"
    return f"torch cannot use them: {node.facts.cuda}" if node.facts.cuda else None


def _full_disk(facts: NodeReport) -> str | None:
    full = [
        f"{place} has {free / 2**30:.1f} GiB free, {used:.0%} used"
        for place, (free, used) in facts.disks.items()
        if free < FREE_BYTES or used > FULL
    ]
    return "; ".join(full) or None


def _other_time(node: Node) -> str | None:
    if node.facts is None or abs(node.ahead_s) < CLOCKS_S:
        return None
    return f"{abs(node.ahead_s):.0f} s {'ahead' if node.ahead_s > 0 else 'behind'}"
