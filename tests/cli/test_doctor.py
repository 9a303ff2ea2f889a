"""``csmae doctor`` on this machine, and on a cluster whose nodes differ."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from csmae import __version__
from tests.conftest import free_port
from tests.support.archives import write_v2
from tests.support.own_cluster import TOKEN, own_cluster
from tests.support.processes import run_code
from tests.support.searches import ROOT, write

OWN_MOUNTS = """
set -e
mount -t tmpfs tmpfs "$1"
mount -t tmpfs tmpfs "$2"
mount --bind "$3" "$4"
shift 4
exec "$@"
"""
"""Runs a node with its own storage and archive, and another file or folder in place of one of the program's."""

ALL = ["nodes", "versions", "storage", "data", "token", "GPUs", "disks", "clocks", "placement", "MLflow"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from csmae.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return run_code(code, *arguments, environment=environment)


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


def test_all_checks_pass_on_one_machine(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").touch(0o600)
    (tmp_path / ".ray/auth_token").write_text(TOKEN)
    done = run("doctor", str(write(tmp_path)), "--storage", str(tmp_path / "runs"), HOME=str(tmp_path))
    found = rows(done.stdout)
    assert [name for name, (mark, _) in found.items() if mark == "✓"] == ALL, done.stdout + done.stderr
    assert "synthetic, 32 train" in found["data"][1] and done.returncode == 0
    assert not list((tmp_path / "runs").iterdir())


def test_failed_checks_on_one_machine_say_what_to_do(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o644)
    study = [str(write(tmp_path)), "--set", "data.path=/no-such-folder", "--set", "search.workers_per_trial=512"]
    study += ["--set", "optim.batch_size=512"]
    places = ["--storage", str(token / "runs"), "--mlflow-uri", f"http://127.0.0.1:{free_port()}"]
    done = run("doctor", *study, *places, RAY_AUTH_TOKEN_PATH=str(token))
    found = rows(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {name: text for name, (mark, text) in found.items() if mark == "✗"}
    assert set(failed) == {"storage", "data", "token", "placement", "MLflow"}, done.stdout
    assert (
        "runs cannot be written: Not a directory" in failed["storage"] and "no folder /no-such-folder" in failed["data"]
    )
    assert "others may read it (0644)" in failed["token"] and "chmod 600" in failed["token"]
    assert "needs 512 CPUs" in failed["placement"] and "lower --workers-per-trial" in failed["placement"]
    assert "nothing answers there" in failed["MLflow"]


@pytest.mark.skipif(os.geteuid() != 0, reason="other mounts for one node take root")
def test_a_node_that_differs_is_found_before_the_first_trial(tmp_path: Path) -> None:
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
        done = run("doctor", *options, **environment)
        assert done.returncode == 0, done.stdout + done.stderr

        own_mounts = ["unshare", "--mount", "sh", "-c", OWN_MOUNTS, "sh", str(storage), str(archive)]
        cluster.add_node(1, [*own_mounts, str(other), str(package / "__init__.py")])
        cluster.add_node(1, [*own_mounts, str(tmp_path / "nothing"), str(package)])
        done = run("doctor", *options, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        failed = {name: text for name, (mark, text) in rows(done.stdout).items() if mark == "✗"}
        assert set(failed) == {"nodes", "versions", "storage", "data"}
        assert "No module named 'csmae" in failed["nodes"] and f"csmae {__version__}-" in failed["versions"]
        assert "does not see what the driver writes" in failed["storage"] and "must hold one LMDB" in failed["data"]

        done = run("search", *options, **environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["nodes", "versions", "storage", "data"]
