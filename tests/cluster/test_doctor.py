"""What the doctor sees on this machine, and on a cluster of which one node is not as the others."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from csmae.cluster.node_report import ClusterReport, Node, NodeReport
from csmae.cluster.preflight import advisory_checks, required_checks
from tests.conftest import free_port
from tests.support.archives import write_v2
from tests.support.own_cluster import TOKEN, own_cluster
from tests.support.processes import run_code
from tests.tuning.test_search import ROOT, write

APART = """
set -e
mount -t tmpfs tmpfs "$1"
mount -t tmpfs tmpfs "$2"
mount --bind "$3" "$4"
shift 4
exec "$@"
"""
"""A node with a storage and an archive of its own, and another file or folder in the place of one of the program's."""

ALL = ["nodes", "versions", "storage", "data", "token", "GPUs", "disks", "clocks", "placement", "MLflow"]

FACTS = NodeReport({"python": "3.11.7"}, "0600", (), None, {"/": (2**40, 0.1)}, None, "two pairs", None, 0.0)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = "search" if arguments[0] == "search.py" else "csmae.__main__"
    code = f"import sys; from {command} import main; sys.exit(main(sys.argv[1:]))"
    return run_code(code, *arguments[1:], environment=environment)


def rows(output: str) -> dict[str, tuple[str, str]]:
    """Mark and text of each check."""
    found, name = dict[str, tuple[str, str]](), ""
    for line in output.splitlines():
        if line[0] in "✓✗":
            mark, name, text = line.split(maxsplit=2)
            found[name] = mark, text.strip()
        elif line.startswith(" "):
            found[name] = found[name][0], f"{found[name][1]} {line.strip()}"
    return found


def test_one_machine_where_all_is_well(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").touch(0o600)
    (tmp_path / ".ray/auth_token").write_text(TOKEN)
    done = run("csmae", "doctor", str(write(tmp_path)), "--storage", str(tmp_path / "runs"), HOME=str(tmp_path))
    found = rows(done.stdout)
    assert [name for name, (mark, _) in found.items() if mark == "✓"] == ALL, done.stdout + done.stderr
    assert "synthetic, 32 train" in found["data"][1] and done.returncode == 0
    assert not list((tmp_path / "runs").iterdir())


def test_one_machine_where_much_is_not_well(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o644)
    study = [str(write(tmp_path)), "--set", "data.path=/no-such-folder", "--set", "search.workers_per_trial=512"]
    study += ["--set", "optim.batch_size=512"]
    places = ["--storage", str(token / "runs"), "--mlflow-uri", f"http://127.0.0.1:{free_port()}"]
    done = run("csmae", "doctor", *study, *places, RAY_AUTH_TOKEN_PATH=str(token))
    found = rows(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = {name: text for name, (mark, text) in found.items() if mark == "✗"}
    assert set(wrong) == {"storage", "data", "token", "placement", "MLflow"}, done.stdout
    assert (
        "runs cannot be written: Not a directory" in wrong["storage"] and "no folder /no-such-folder" in wrong["data"]
    )
    assert "others may read it (0644)" in wrong["token"] and "chmod 600" in wrong["token"]
    assert "needs 512 CPUs" in wrong["placement"] and "lower --workers-per-trial" in wrong["placement"]
    assert "nothing answers there" in wrong["MLflow"]


@pytest.mark.skipif(os.geteuid() != 0, reason="other mounts for one node take root")
def test_a_node_that_is_not_as_the_others_is_found_before_the_first_trial(tmp_path: Path) -> None:
    archive, storage, package = write_v2(tmp_path / "archive"), tmp_path / "runs", ROOT / "csmae"
    storage.mkdir()
    other = tmp_path / "__init__.py"
    shutil.copy(package / "__init__.py", other)
    other.write_text(other.read_text() + "# changed\n")
    (tmp_path / "nothing").mkdir()
    small = [f"data.path={archive}", "optim.batch_size=2", "eval.k=1"]
    options = [str(write(tmp_path)), "--storage", str(storage), *(word for text in small for word in ("--set", text))]
    with own_cluster(tmp_path) as cluster:
        options += ["--address", cluster.address]
        environment = {"RAY_AUTH_TOKEN_PATH": str(cluster.token)}
        done = run("csmae", "doctor", *options, **environment)
        assert done.returncode == 0, done.stdout + done.stderr

        apart = ["unshare", "--mount", "sh", "-c", APART, "sh", str(storage), str(archive)]
        cluster.add_node(1, [*apart, str(other), str(package / "__init__.py")])
        cluster.add_node(1, [*apart, str(tmp_path / "nothing"), str(package)])
        done = run("csmae", "doctor", *options, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        wrong = {name: text for name, (mark, text) in rows(done.stdout).items() if mark == "✗"}
        assert set(wrong) == {"nodes", "versions", "storage", "data"}
        assert "No module named 'csmae" in wrong["nodes"] and "csmae 0.1.0-" in wrong["versions"]
        assert "does not see what the driver writes" in wrong["storage"] and "must hold one LMDB" in wrong["data"]

        done = run("search.py", *options, **environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["nodes", "versions", "storage", "data"]


def report_nodes(name: str, node: NodeReport | None, ray_gpus: int = 0, ahead_s: float = 0.0) -> ClusterReport:
    return ClusterReport(FACTS, [Node("a", 0, FACTS, ""), Node(name, ray_gpus, node, "", ahead_s)])


def changed(**values: object) -> NodeReport:
    return NodeReport(**vars(FACTS) | values)


@pytest.mark.parametrize(
    ("seen", "name", "text"),
    [
        (report_nodes("b", FACTS, ahead_s=9.2), "clocks", "b: 9 s ahead"),
        (report_nodes("b", FACTS, ahead_s=-61), "clocks", "b: 61 s behind"),
        (
            report_nodes("b", changed(gpus=("NVIDIA H100 driver 580",))),
            "GPUs",
            "b: Ray hands out 0, nvidia-smi lists 1",
        ),
        (report_nodes("b", FACTS, 1), "GPUs", "b: Ray hands out 1, nvidia-smi lists 0"),
        (
            report_nodes("b", changed(gpus=("NVIDIA T4 driver 9",), cuda="too old"), 1),
            "GPUs",
            "b: torch cannot use them: too old",
        ),
        (report_nodes("b", changed(disks={"/data": (2**30, 0.5)})), "disks", "b: /data has 1.0 GiB free, 50% used"),
        (report_nodes("b", changed(disks={"/": (2**40, 0.96)})), "disks", "b: / has 1024.0 GiB free, 96% used"),
        (report_nodes("b", changed(token="none")), "token", "b: there is none"),
        (report_nodes("b", changed(versions={"python": "3.12.1"})), "versions", "b: python 3.12.1, here 3.11.7"),
        (report_nodes("b", changed(data="three pairs")), "data", "b: three pairs; here two pairs"),
    ],
)
def test_what_is_wrong_is_said_of_its_node_alone(seen: ClusterReport, name: str, text: str) -> None:
    wrong = [it for it in (*required_checks(seen), *advisory_checks(seen)) if it.remedy]
    assert [(it.name, it.found) for it in wrong] == [(name, text)]
