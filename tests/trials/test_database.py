"""The database of studies: shared, copied, damaged, locked, of another version, on a full disk."""

import io
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher
from rich.console import Console

from csmae.config import ConfigError
from csmae.console.tables import format_studies
from csmae.storage.layout import DATABASE
from csmae.study.study import Study, load_study
from csmae.trials.database import load_stored_study
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study
from csmae.tuning.events import SearchOutcome
from tests.study.test_study import write
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")


def test_a_changed_study_is_rejected_with_the_difference(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    changed = make_study(tmp_path, {"masking.ratio": {"float": [0.3, 0.8]}})
    with pytest.raises(ConfigError, match="started with a different definition") as caught:
        TrialStore(changed, tmp_path)
    assert "space.masking.ratio was float 0.3 to 0.9, is float 0.3 to 0.8" in str(caught.value)
    assert 'space.masking.strategy was one of "random", "disjoint", is not there' in str(caught.value)
    TrialStore(make_study(tmp_path, sampler="random", num_trials=99), tmp_path)


def test_studies_of_different_names_share_a_database(tmp_path: Path) -> None:
    one = load_study(write(tmp_path, SPACE), "one")
    two = load_study(write(tmp_path, {"masking.ratio": {"float": [0.1, 0.2]}}), "two")
    TrialStore(one, tmp_path).ask()
    assert TrialStore(two, tmp_path).trials() == []


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "studies.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ConfigError, match=r"studies\.db: cannot be used"):
        TrialStore(make_study(tmp_path), tmp_path)


def test_a_database_of_another_optuna_is_named(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    TrialStore(study, tmp_path)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")
    with pytest.raises(ConfigError, match=r"studies\.db: was written by another version of Optuna"):
        TrialStore(study, tmp_path)


@pytest.mark.slow
def test_a_locked_database_is_named(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    TrialStore(study, tmp_path)
    with closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=r"studies\.db: another process holds the database"):
            TrialStore(study, tmp_path)


def test_a_full_disk_ends_the_search_and_loses_no_trial(small_disk: Path) -> None:
    study = make_study(small_disk)
    searcher, _ = make_searcher(study, small_disk)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 0.5))
    ballast = small_disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    for epoch in (2, 3):
        searcher.on_trial_result("a", result(epoch, 0.6))
    searcher.on_trial_complete("a", result(4, 0.7, finished=True))
    assert (
        searcher.search_end is not None
        and searcher.search_end.outcome is SearchOutcome.STORAGE_FAILED
        and "disk is full" in searcher.search_end.reason
    )
    assert searcher.suggest("b") == Searcher.FINISHED
    ballast.unlink()
    trial_store = TrialStore(study, small_disk)
    assert [trial.state for trial in trial_store.trials()] == [TrialState.RUNNING] and trial_store.num_interrupted == 1


def test_a_study_resumes_from_a_copy_of_the_database(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    searcher, _ = make_searcher(study, tmp_path)
    first = searcher.suggest("a")
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(tmp_path / "studies.db", other)
    again, _ = make_searcher(study, other)
    suggestion = again.suggest("a")
    assert isinstance(first, dict) and isinstance(suggestion, dict) and suggestion["config"] == first["config"]


@pytest.fixture
def study_of_0_1_0(tmp_path: Path) -> Study:
    """A study in the database without the format that this version writes."""
    study = make_study(tmp_path)
    TrialStore(study, tmp_path)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database, database:
        database.execute("DELETE FROM study_user_attributes WHERE key = 'format'")
    return study


REASON = "was created by csmae 0.1.0: use that version for it, or start a new study with --name"


def test_a_study_of_version_0_1_0_is_rejected_with_one_line(tmp_path: Path, study_of_0_1_0: Study) -> None:
    rejections = (
        lambda: TrialStore(study_of_0_1_0, tmp_path),
        lambda: load_source_study(tmp_path / DATABASE, "study", study_of_0_1_0),
        lambda: load_stored_study(tmp_path / DATABASE, "study"),
    )
    for reject in rejections:
        with pytest.raises(ConfigError) as caught:
            reject()
        assert str(caught.value) == f"study 'study' in {tmp_path / DATABASE} {REASON}"


def test_the_list_of_studies_shows_a_study_of_version_0_1_0_by_its_name(tmp_path: Path, study_of_0_1_0: Study) -> None:
    TrialStore(load_study(write(tmp_path, SPACE), "other"), tmp_path)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(format_studies(tmp_path / DATABASE))
    old, new = console.export_text().splitlines()[-2:]
    assert old.split() == ["study", "(other", "version)"] and new.split()[0] == "other"
