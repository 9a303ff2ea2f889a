"""Changes of a study's definition before a trial was trained keep numbers, resources and sources, even if the driver is killed."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine

from csmae.config import ConfigError
from csmae.storage import object_store as bucket
from csmae.storage.layout import DATABASE
from csmae.storage.manifest import DRIVER, Claim, RemoteFolder, RemoteStorage
from csmae.storage.object_store import ObjectStore
from csmae.study.study import Study, load_study
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from tests.study.test_study import write
from tests.support.bucket_server import Server, running
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")

REASON = "the time limit of 1s is reached"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


def narrower(folder: Path, smallest: float) -> Study:
    return make_study(folder, {**SPACE, "masking.ratio": {"float": [smallest, 0.9]}})


def cut_short_untrained_trial(folder: Path, **search: Any) -> None:
    """A trial that used an hour, has no checkpoint yet, and is cut short by its budget."""
    searcher, _ = make_searcher(make_study(folder, **search), folder)
    searcher.suggest("a")
    searcher._running["a"].trial.set_user_attr("worker_s", 3600.0)
    searcher.cut_short_trials(REASON)
    searcher._budget.write()


def assert_kept(trial_store: TrialStore, costs: list[float]) -> None:
    """These untrained trials keep the seconds that they used, and their numbers are not used again."""
    trials = trial_store.all_trials()
    assert [trial.user_attrs.get("worker_s", 0.0) for trial in trials if trial.state.is_finished()] == costs
    assert [trial.number for trial in trials if trial.state is TrialState.WAITING] == [len(costs)]
    assert trial_store.optuna_study.user_attrs["elapsed_s"] > 0 and Budget(trial_store).hours >= sum(costs) / 3600


def test_a_trial_cut_short_keeps_its_number_and_its_resources_when_the_definition_changes(tmp_path: Path) -> None:
    cut_short_untrained_trial(tmp_path)
    assert_kept(TrialStore(narrower(tmp_path, 0.4), tmp_path), [3600.0])


def test_trials_keep_their_numbers_and_resources_however_often_the_definition_changes(tmp_path: Path) -> None:
    cut_short_untrained_trial(tmp_path)
    for smallest in (0.4, 0.45, 0.5):
        trial_store = TrialStore(narrower(tmp_path, smallest), tmp_path)
    assert_kept(trial_store, [3600.0])
    trial = trial_store.ask()
    trial.set_user_attr("worker_s", 60.0)
    trial_store.fail(trial, "out of memory")
    assert_kept(TrialStore(narrower(tmp_path, 0.35), tmp_path), [3600.0, 60.0])


def test_transferred_trials_reserve_no_numbers_when_the_definition_changes(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    forked(tmp_path, 0.3)
    assert [trial.state.name for trial in forked(tmp_path, 0.2).all_trials()] == ["WAITING", "COMPLETE"]


def forked(folder: Path, smallest: float) -> TrialStore:
    """A study with the trials of another one, transferred again after each change of its definition."""
    space = {**SPACE, "masking.ratio": {"float": [smallest, 0.9]}}
    trial_store = TrialStore(load_study(write(folder, space), "fork"), folder)
    for name in {"study", *trial_store.sources}:
        transfer_trials(trial_store, load_source_study(folder / DATABASE, name, trial_store.study))
    return trial_store


def states_during_change(folder: Path) -> list[Path]:
    """What a kill leaves at each commit to the database while a definition changes."""
    cut_short_untrained_trial(folder)
    states: list[Path] = []

    def keep(connection: object) -> None:
        states.append(folder / f"state-{len(states)}")
        states[-1].mkdir()
        for path in folder.glob(f"{DATABASE}*"):  # with SQLite's journal
            shutil.copy(path, states[-1])
        shutil.copytree(folder / "study", states[-1] / "study")

    event.listen(Engine, "commit", keep)
    try:
        TrialStore(narrower(folder, 0.4), folder)
    finally:
        event.remove(Engine, "commit", keep)
    return states


def num_rows(folder: Path, table: str) -> int:
    with closing(sqlite3.connect(folder / DATABASE)) as database:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


@pytest.mark.slow
def test_a_change_of_definition_survives_a_kill_at_any_commit(tmp_path: Path) -> None:
    states = states_during_change(tmp_path)
    for state, smallest in zip(states, cycle((0.4, 0.5)), strict=False):
        assert_kept(TrialStore(narrower(state, smallest), state), [3600.0])


def test_a_change_of_definition_survives_a_kill_between_deletion_and_creation(tmp_path: Path) -> None:
    states = states_during_change(tmp_path)
    deleted = next(state for state in states if not num_rows(state, "studies"))
    defined = [state for state in states if num_rows(state, "studies") and not num_rows(state, "trials")][-1]
    for state, smallest in ((deleted, 0.4), (defined, 0.5)):
        assert_kept(TrialStore(narrower(state, smallest), state), [3600.0])


def test_a_kill_between_the_change_of_definition_and_the_transfer_loses_no_source(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    forked(tmp_path, 0.3)
    wider = load_study(write(tmp_path, {**SPACE, "masking.ratio": {"float": [0.2, 0.9]}}), "fork")
    TrialStore(wider, tmp_path)  # killed here
    trial_store = TrialStore(wider, tmp_path)
    assert trial_store.sources == ["study"]
    assert transfer_trials(trial_store, load_source_study(tmp_path / DATABASE, "study", wider)).num_copied == 1
    assert TrialStore(wider, tmp_path).sources == []


def test_with_a_bucket_a_study_may_change_until_the_bucket_has_a_checkpoint(server: Server, tmp_path: Path) -> None:
    store = ObjectStore(server.url("lab/runs"))
    remote = RemoteStorage(store, tmp_path, RemoteFolder(store, DRIVER).claim())
    for smallest in (0.3, 0.4):
        study = narrower(tmp_path, smallest)
        trial_store = TrialStore(study, tmp_path, remote)
        study.space.suggest(trial_store.ask())  # and the driver is killed
    state = tmp_path / "state"
    state.mkdir()
    (state / "checkpoint.pt").touch()
    remote.remote_folder(trial_store.run_dir(1)).claim().push(state, {})
    with pytest.raises(ConfigError, match=r"masking\.ratio was"):
        TrialStore(narrower(tmp_path, 0.5), tmp_path, remote)


@pytest.mark.slow
def test_a_change_of_definition_names_a_bucket_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "RETRY_FOR_S", 0.0)
    store = ObjectStore("s3://lab/runs?endpoint_override=127.0.0.1:9&scheme=http")
    remote = RemoteStorage(store, tmp_path, Claim(RemoteFolder(store, DRIVER), "00000001-00000000"))
    study = narrower(tmp_path, 0.3)
    study.space.suggest(TrialStore(study, tmp_path, remote).ask())
    with pytest.raises(ConfigError, match=r"--storage s3://lab/runs\S*: .*run again when it does"):
        TrialStore(narrower(tmp_path, 0.4), tmp_path, remote)
