"""Several searches that begin on one storage at the same moment."""

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


def errors(what: Callable[[int], object], num_processes: int) -> list[str]:
    """Call it in processes that begin together, each with its number; the last line of what went wrong in any."""
    told: multiprocessing.SimpleQueue[str] = forked.SimpleQueue()
    barrier = forked.Barrier(num_processes)

    def call(number: int) -> None:
        barrier.wait(60)
        try:
            what(number)
            told.put("")
        except Exception:
            told.put(traceback.format_exc().splitlines()[-1])

    processes = [forked.Process(target=call, args=(number,)) for number in range(num_processes)]
    for process in processes:
        process.start()
    found = [told.get() for _ in processes]
    for process in processes:
        process.join(60)
    return [text for text in found if text]


def test_searches_that_begin_together_make_one_database_of_studies(tmp_path: Path) -> None:
    studies = [load_study(write(tmp_path, SPACE), f"study-{number}") for number in range(6)]
    assert errors(lambda number: TrialStore(studies[number], tmp_path / "runs"), 6) == []
    names = optuna.get_all_study_names(f"sqlite:///{tmp_path}/runs/{DATABASE}")
    assert sorted(names) == sorted(study.name for study in studies)


def test_searches_that_begin_together_make_one_database_of_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert errors(lambda number: MlflowSink(uri, f"study-{number}", str(number)), 3) == []


def test_searches_that_begin_together_find_a_whole_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)

    def tokens(number: int) -> None:
        AuthenticationTokenLoader.instance().reset_cache()  # Ray remembers the token of tests before this one
        ensure_token()
        assert len((home / ".ray/auth_token").read_text()) == 64

    for number in range(4):
        home = tmp_path / str(number)
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        assert errors(tokens, 8) == []
        assert [path.name for path in (home / ".ray").iterdir()] == ["auth_token"]
