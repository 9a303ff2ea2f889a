"""Several searches that start on one storage at the same moment."""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

from csmae.cluster.auth import ensure_token
from csmae.storage.layout import DATABASE
from csmae.study.study import load_study
from csmae.tracking.mlflow_sink import MlflowSink
from csmae.trials.store import TrialStore
from tests.study.test_study import write
from tests.tuning.test_searcher import SPACE

forked = multiprocessing.get_context("fork")


def run_concurrently(function: Callable[[int], object], num_processes: int) -> list[str]:
    """Call a function with 0, 1, … in processes that start together; return the last line of each traceback."""
    results: multiprocessing.SimpleQueue[str] = forked.SimpleQueue()
    barrier = forked.Barrier(num_processes)

    def call(number: int) -> None:
        barrier.wait(60)
        try:
            function(number)
            results.put("")
        except Exception:
            results.put(traceback.format_exc().splitlines()[-1])

    processes = [forked.Process(target=call, args=(number,)) for number in range(num_processes)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join(60)
    return [text for text in found if text]


def test_searches_that_start_together_create_one_database_of_studies(tmp_path: Path) -> None:
    studies = [load_study(write(tmp_path, SPACE), f"study-{number}") for number in range(6)]
    assert run_concurrently(lambda number: TrialStore(studies[number], tmp_path / "runs"), 6) == []
    names = optuna.get_all_study_names(f"sqlite:///{tmp_path}/runs/{DATABASE}")
    assert sorted(names) == sorted(study.name for study in studies)


def test_searches_that_start_together_create_one_mlflow_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert run_concurrently(lambda number: MlflowSink(uri, f"study-{number}", str(number)), 3) == []


def test_searches_that_start_together_read_a_complete_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)

    def tokens(number: int) -> None:
        AuthenticationTokenLoader.instance().reset_cache()  # Ray caches the token of earlier tests
        ensure_token()
        assert len((home / ".ray/auth_token").read_text()) == 64

    for number in range(4):
        home = tmp_path / str(number)
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        assert run_concurrently(tokens, 8) == []
        assert [path.name for path in (home / ".ray").iterdir()] == ["auth_token"]
