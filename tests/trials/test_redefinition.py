"""Studies that are defined anew before anything was trained: numbers, costs and sources stay, whenever the driver is killed."""

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
from csmae.storage.manifest import RemoteStorage
from csmae.storage.object_store import ObjectStore
from csmae.study.study import Study, load_study
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from tests.study.test_study import write
from tests.support.bucket_server import Server, running
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")

OVER = "the time limit of 1s is reached"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    yield from running()


def narrower(folder: Path, smallest: float) -> Study:
    return make_study(folder, {**SPACE, "masking.ratio": {"float": [smallest, 0.9]}})


def cut_before_anything(folder: Path, **search: Any) -> None:
    """A trial that cost an hour and has no checkpoint yet, cut by its budget."""
    searcher, _ = make_searcher(make_study(folder, **search), folder)
    searcher.suggest("a")
    searcher._running["a"].trial.set_user_attr("worker_s", 3600.0)
    searcher.cut_short_trials(OVER)
    searcher._budget.write()


def kept(trial_store: TrialStore, costs: list[float]) -> None:
    """These trials, none of which was trained, cost so much, and their numbers are not used again."""
    trials = trial_store.all_trials()
    assert [trial.user_attrs.get("worker_s", 0.0) for trial in trials if trial.state.is_finished()] == costs
    assert [trial.number for trial in trials if trial.state is TrialState.WAITING] == [len(costs)]
    assert trial_store.optuna_study.user_attrs["elapsed_s"] > 0 and Budget(trial_store).hours >= sum(costs) / 3600


def test_a_cut_trial_keeps_its_number_and_cost_when_the_study_is_defined_anew(tmp_path: Path) -> None:
    cut_before_anything(tmp_path)
    kept(TrialStore(narrower(tmp_path, 0.4), tmp_path), [3600.0])


def test_trials_keep_their_numbers_and_costs_however_often_the_study_is_defined_anew(tmp_path: Path) -> None:
    cut_before_anything(tmp_path)
    for smallest in (0.4, 0.45, 0.5):
        trial_store = TrialStore(narrower(tmp_path, smallest), tmp_path)
    kept(trial_store, [3600.0])
    trial = trial_store.ask()
    trial.set_user_attr("worker_s", 60.0)
    trial_store.fail(trial, "out of memory")
    kept(TrialStore(narrower(tmp_path, 0.35), tmp_path), [3600.0, 60.0])


def test_trials_taken_over_take_no_numbers_of_a_study_that_is_defined_anew(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    forked(tmp_path, 0.3)
    assert [trial.state.name for trial in forked(tmp_path, 0.2).all_trials()] == ["WAITING", "COMPLETE"]


def forked(folder: Path, smallest: float) -> TrialStore:
    """A study that takes over from another one, and again where it is defined anew."""
    space = {**SPACE, "masking.ratio": {"float": [smallest, 0.9]}}
    trial_store = TrialStore(load_study(write(folder, space), "fork"), folder)
    for name in {"study", *trial_store.sources}:
        transfer_trials(trial_store, load_source_study(folder / DATABASE, name, trial_store.study))
    return trial_store


def states_while_defined_anew(folder: Path) -> list[Path]:
    """What a kill leaves of a study that is being defined anew, at each commit to the database."""
    cut_before_anything(folder)
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
def test_a_study_that_is_being_defined_anew_survives_a_kill_at_any_commit(tmp_path: Path) -> None:
    states = states_while_defined_anew(tmp_path)
    for state, smallest in zip(states, cycle((0.4, 0.5)), strict=False):
        kept(TrialStore(narrower(state, smallest), state), [3600.0])


def test_a_study_that_is_being_defined_anew_survives_a_kill_while_it_is_deleted(tmp_path: Path) -> None:
    states = states_while_defined_anew(tmp_path)
    deleted = next(state for state in states if not num_rows(state, "studies"))
    defined = [state for state in states if num_rows(state, "studies") and not num_rows(state, "trials")][-1]
    for state, smallest in ((deleted, 0.4), (defined, 0.5)):
        kept(TrialStore(narrower(state, smallest), state), [3600.0])


def test_a_kill_between_the_redefinition_and_the_take_over_loses_no_source(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    forked(tmp_path, 0.3)
    wider = load_study(write(tmp_path, {**SPACE, "masking.ratio": {"float": [0.2, 0.9]}}), "fork")
    TrialStore(wider, tmp_path)  # killed here
    trial_store = TrialStore(wider, tmp_path)
    assert trial_store.sources == ["study"]
    assert transfer_trials(trial_store, load_source_study(tmp_path / DATABASE, "study", wider)) == 1
    assert TrialStore(wider, tmp_path).sources == []


def test_with_a_bucket_a_study_may_change_until_the_bucket_has_a_state_of_a_trial(
    server: Server, tmp_path: Path
) -> None:
    remote = RemoteStorage(ObjectStore(server.url("lab/runs")), tmp_path)
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
def test_a_bucket_that_does_not_answer_is_named_where_a_study_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "RETRY_FOR_S", 0.0)
    remote = RemoteStorage(ObjectStore("s3://lab/runs?endpoint_override=127.0.0.1:9&scheme=http"), tmp_path)
    study = narrower(tmp_path, 0.3)
    study.space.suggest(TrialStore(study, tmp_path, remote).ask())
    with pytest.raises(ConfigError, match=r"--storage s3://lab/runs\S*: .*run again when it does"):
        TrialStore(narrower(tmp_path, 0.4), tmp_path, remote)
