"""Checkpoints of paused trials within a disk limit."""

from pathlib import Path

import pytest

from csmae.config import ConfigError
from csmae.model.cost import checkpoint_bytes
from csmae.trial_status import TrialStatus
from csmae.trials.store import TrialStore
from csmae.trials.trial import assignments, is_dropped, num_restarts, status_of
from csmae.tuning.strategy.base import Decision, NewTrial, Resume
from tests.support.promotion import Promotion
from tests.tuning.test_pausing_search import EPOCHS, Driver, make_study

pytestmark = pytest.mark.usefixtures("copied_database")


def limited(folder: Path, num_checkpoints: float) -> Driver:
    study = make_study(folder)
    size = checkpoint_bytes(study.resolve({}))
    return Driver(make_study(folder, disk_limit=f"{num_checkpoints * size / 1e6}MB", keep=1), folder / "runs")


def num_checkpoints(store: TrialStore) -> int:
    return len(list(store.folder.glob("trials/*/checkpoint.pt")))


def test_the_least_likely_paused_trials_lose_their_checkpoints(tmp_path: Path) -> None:
    driver = limited(tmp_path, 3.5)
    assert driver.run(limit=8) is False
    assert 1 <= num_checkpoints(driver.store) <= 3
    trials = driver.store.trials()
    dropped = [trial.number for trial in trials if is_dropped(trial)]
    assert dropped
    paused = [trial for trial in trials if status_of(trial) is TrialStatus.PAUSED]
    assert {driver.store.run_dir(n).joinpath("checkpoint.pt").exists() for n in dropped} == {False}
    likely = Promotion(EPOCHS).expectation(driver.searcher._planner._observations.views())
    kept = [trial.number for trial in paused if trial.number not in dropped]
    assert min(likely[number] for number in kept) >= max(likely[number] for number in dropped)


def test_a_dropped_trial_restarts_from_scratch_and_is_counted(tmp_path: Path) -> None:
    class LastIsResumed(Promotion):
        def next(self, trials, num_new) -> Decision | None:  # type: ignore[no-untyped-def]
            if num_new:
                return NewTrial(1, "first epoch")
            dropped = next((trial for trial in trials if trial.status is TrialStatus.PAUSED), None)
            return Resume(dropped.number, EPOCHS, "resumed") if dropped else None

    study = make_study(tmp_path)
    size = checkpoint_bytes(study.resolve({}))
    study = make_study(tmp_path, disk_limit=f"{2.5 * size / 1e6}MB", keep=1, num_trials=4)
    driver = Driver(study, tmp_path / "runs", LastIsResumed(EPOCHS))
    assert driver.run()
    restarts = {trial.number: num_restarts(trial) for trial in driver.store.trials()}
    assert sum(restarts.values()) >= 1
    restarted = next(trial for trial in driver.store.trials() if num_restarts(trial))
    assert [piece["from"] for piece in assignments(restarted)] == [0, 0]
    assert all(status_of(trial) is TrialStatus.COMPLETE for trial in driver.store.trials())


def test_a_limit_below_one_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search.disk_limit 1MB is less than one checkpoint, about .*MB"):
        make_study(tmp_path, disk_limit="1MB")


@pytest.mark.parametrize("text", ["50", "50 kB", "-1GB", "GB"])
def test_a_limit_needs_a_number_and_a_unit(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"disk_limit.*such as 500MB"):
        make_study(tmp_path, disk_limit=text)
