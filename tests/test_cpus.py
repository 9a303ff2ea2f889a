"""CPUs that a container or a batch system allows, from the kernel's files."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csmae.cluster.resources import local_resources
from csmae.cpus import CGROUPS, usable_cpus
from tests.training.test_ddp import ROOT

AFFINITY = len(os.sched_getaffinity(0))


def groups(folder: Path, membership: str, **files: str) -> dict[str, Path]:
    """Write the kernel's files; returns the arguments of ``usable_cpus``. Two underscores are a slash, three a dot."""
    for name, text in files.items():
        path = folder / "cgroup" / name.replace("___", ".").replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "membership").write_text(membership)
    return {"cgroups": folder / "cgroup", "membership": folder / "membership"}


def test_a_containers_quota_of_cgroup_v2_counts(tmp_path: Path) -> None:
    assert usable_cpus(**groups(tmp_path, "0::/\n", cpu___max="100000 100000\n")) == 1


def test_a_containers_quota_of_cgroup_v1_counts(tmp_path: Path) -> None:
    files = {"cpu__cpu___cfs_quota_us": "150000\n", "cpu__cpu___cfs_period_us": "100000\n"}
    assert usable_cpus(**groups(tmp_path, "3:cpu,cpuacct:/docker/0123\n", **files)) == 1


def test_the_quota_of_a_parent_group_counts(tmp_path: Path) -> None:
    files = {"user__job__cpu___max": "max 100000\n", "user__cpu___max": "100000 100000\n"}
    assert usable_cpus(**groups(tmp_path, "0::/user/job\n", **files)) == 1


def test_less_than_one_cpu_is_one(tmp_path: Path) -> None:
    assert usable_cpus(**groups(tmp_path, "0::/\n", cpu___max="20000 100000\n")) == 1


@pytest.mark.parametrize("text", ["max 100000\n", "6400000 100000\n", "", "nonsense\n", "0 0\n"])
def test_without_an_effective_quota_the_affinity_counts(tmp_path: Path, text: str) -> None:
    assert usable_cpus(**groups(tmp_path, "0::/\n", cpu___max=text)) == AFFINITY


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none", tmp_path / "none") == AFFINITY


@pytest.fixture
def one_cpu() -> Iterator[Path]:
    """A real control group with a quota of one CPU."""
    root = CGROUPS / "cpu" if (CGROUPS / "cpu/cpu.cfs_quota_us").exists() else CGROUPS
    group = root / f"csmae-test-{os.getpid()}"
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("100000")
        else:
            (group / "cpu.max").write_text("100000 100000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"a control group with a quota takes root and a writable {root}: {error}")
    yield group
    group.rmdir()


def test_a_real_quota_limits_the_local_resources(one_cpu: Path) -> None:
    code = "from csmae.cluster.resources import local_resources; print(local_resources().cpus)"
    join = f"echo $$ > {one_cpu}/cgroup.procs && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["sh", "-c", join], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1", done.stdout + done.stderr


def test_train_uses_as_many_threads_as_the_quota_allows(one_cpu: Path, tmp_path: Path) -> None:
    code = "import sys, torch; from csmae.cli.main import main; main(sys.argv[1:]); print(torch.get_num_threads())"
    (tmp_path / "run.yaml").write_text("train: {epochs: 12, seed: -1}")
    join = f"echo $$ > {one_cpu}/cgroup.procs && exec env -u OMP_NUM_THREADS {sys.executable} -c '{code}' train {tmp_path}/run.yaml"
    done = subprocess.run(["sh", "-c", join], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1", done.stdout + done.stderr


def test_local_resources_count_the_usable_cpus() -> None:
    assert local_resources().cpus == usable_cpus()
