"""Which clusters a search joins: real ones with and without a token, and what is not a cluster."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csmae.cli.main import main
from csmae.cluster.auth import authenticate, gcs_address
from csmae.config import ConfigError
from tests.conftest import free_port
from tests.support.own_cluster import OwnCluster, own_cluster
from tests.support.searches import ROOT, write


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account without a token."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="module")
def with_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnCluster]:
    with own_cluster(tmp_path_factory.mktemp("with-token")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def without_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnCluster]:
    with own_cluster(tmp_path_factory.mktemp("without-token"), "disabled") as cluster:
        yield cluster


def arguments(folder: Path, address: str) -> list[str]:
    """Arguments of a search with one short trial."""
    options = ["--storage", str(folder / "runs"), "--set", "train.epochs=1", "--set", "optim.warmup_epochs=0"]
    return [str(write(folder, num_trials=1)), "--address", address, *options]


def search_in_a_process(folder: Path, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "search.py"), *arguments(folder, address), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_search_does_not_join_a_cluster_that_requires_no_token(
    without_token: OwnCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *arguments(tmp_path, without_token.address)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, out + err
    assert "requires no token" in err and "--insecure" in err


@pytest.mark.slow
def test_a_search_joins_such_a_cluster_with_insecure(without_token: OwnCluster, tmp_path: Path) -> None:
    done = search_in_a_process(tmp_path, without_token.address, "--insecure")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_search_sends_the_token_of_its_account(
    with_token: OwnCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(with_token.token))
    done = search_in_a_process(tmp_path, with_token.address)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_missing_or_wrong_token_is_an_error(
    with_token: OwnCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="does not accept the token"):
        authenticate(gcs_address(with_token.address), insecure=False)
    (tmp_path / "wrong").write_text("f" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "wrong"))
    with pytest.raises(ConfigError, match="does not accept the token"):
        authenticate(gcs_address(with_token.address), insecure=True)


@pytest.mark.parametrize(
    ("address", "text"),
    [("nonsense", "no Ray there"), ("ray://127.0.0.1:10001", "log in there"), ("local", "names no cluster")],
)
def test_an_address_that_names_no_cluster_is_an_error(address: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        gcs_address(address)


def test_an_address_where_nothing_listens_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing answers at"):
        gcs_address(f"127.0.0.1:{free_port()}")


@pytest.mark.slow
def test_a_port_of_another_program_is_an_error() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        with pytest.raises(ConfigError, match="is not the head of a Ray cluster"):
            authenticate(gcs_address(f"127.0.0.1:{other.getsockname()[1]}"), insecure=True)


def test_a_token_for_a_local_ray_is_readable_by_its_account_only(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import os; os.umask(0); from csmae.cluster.auth import ensure_token; ensure_token()",
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    made = tmp_path / ".ray/auth_token"
    assert (made.parent.stat().st_mode & 0o777, made.stat().st_mode & 0o777) == (0o700, 0o600)
    token = made.read_text()
    subprocess.run(command, check=True, cwd=ROOT)
    assert made.read_text() == token


def test_insecure_needs_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(write(tmp_path)), "--insecure"]) == 2
    assert "--address" in capsys.readouterr().err
