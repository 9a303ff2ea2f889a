"""The number of CPUs that this process may use: its affinity, and the quotas of its control groups (containers, Slurm, systemd)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

MEMBERSHIP = Path("/proc/self/cgroup")


def usable_cpus(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Count the CPUs that this process can keep busy, rounded down, at least one.

    Args:
        cgroups: Mount point of the control groups.
        membership: The kernel's file that lists the groups of this process.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, math.floor(min([Fraction(allowed), *_quotas(cgroups, membership)])))


def _quotas(cgroups: Path, membership: Path) -> Iterator[Fraction]:
    """The CPU quota of each control group that this process belongs to, in cgroup v2 and v1."""
    for folder in _folders(cgroups, membership):
        quota, period = _v2(folder) or _v1(folder) or ("max", "")
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):  # "max" and "-1" mean no limit
            yield Fraction(int(quota), int(period))


def _folders(cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups and of their parents, whose quotas include it.

    Inside a container the listed path is the host's, or ``/``; so the roots always belong to the result.
    """
    for line in _text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        roots = {"": [cgroups, cgroups / "unified"]}.get(controllers)  # v2 names no controllers
        if roots is None and "cpu" in controllers.split(","):
            roots = [cgroups / controllers, cgroups / "cpu"]
        for root in roots or ():
            group = Path(path.lstrip("/"))
            yield from (root / part for part in (group, *group.parents) if ".." not in part.parts)
    yield from (cgroups, cgroups / "cpu")


def _v2(folder: Path) -> tuple[str, str] | None:
    """Quota and period, both in microseconds."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    return (quota, period) if quota else None


def _v1(folder: Path) -> tuple[str, str] | None:
    quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return (quota, period) if quota else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
