"""Searches with population based training on a real trial store, without Ray: copies, restarts, and what a lineage trains."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from csmae.changes import config_at
from csmae.config import Config
from csmae.study.study import Study, load_study
from csmae.trial_status import TrialStatus
from csmae.trials.importance import importances
from csmae.trials.leaderboard import leaderboard
from csmae.trials.lineage import describe_copy, trained_values
from csmae.trials.store import TrialStore
from csmae.trials.trial import assignments, confirmed_number, params_of, parent_number, status_of
from csmae.tuning.champion import encoders_to_score
from csmae.tuning.draft import Draft
from csmae.tuning.strategy.make import make_strategy
from tests.study.test_study import BASE, write
from tests.tuning.test_pausing_search import Driver, Killed, decided
from tests.tuning.test_searcher import result

pytestmark = pytest.mark.usefixtures("copied_database")

SPACE = {
    "masking.ratio": {"float": [0.3, 0.9]},
    "loss.temperature": {"float": [0.05, 1.0], "log": True},
    "masking.strategy": {"choice": ["random", "disjoint"]},
}


def make_study(folder: Path, space: dict[str, Any] = SPACE, **search: Any) -> Study:
    folder.mkdir(exist_ok=True)
    base = {**BASE, "train": {"epochs": 12}}
    settings = {"strategy": "pbt", "num_trials": 6, "sampler": "random", "pbt": {"interval": 3}, **search}
    return load_study(write(folder, space, base, **settings))


class PopulationDriver(Driver):
    """Trains copies from their parents' checkpoints. What is learned depends on the values of each epoch."""

    def __init__(self, study: Study, folder: Path) -> None:
        super().__init__(study, folder, make_strategy(study))

    def _train(self, trial_id: str, suggestion: dict[str, Any], is_killed: Killed) -> bool:
        config, until = Config.model_validate(suggestion["config"]), suggestion["until"]
        checkpoint = Path(suggestion["run_dir"]) / "checkpoint.pt"
        if not checkpoint.exists() and suggestion["parent_dir"]:
            copied = Path(suggestion["parent_dir"], "checkpoint.pt").read_text()
            (trial,) = (t for t in self.store.all_trials() if t.number == suggestion["number"])
            assert int(copied.split()[0]) == assignments(trial)[0]["from"]
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(copied)
            if is_killed(f"copied {trial.number}"):
                return False
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        done, learned = map(float, checkpoint.read_text().split()) if checkpoint.exists() else (0.0, 0.0)
        for epoch in range(int(done) + 1, until + 1):
            masking = config_at(config, epoch - 1).masking
            learned += 1 - (masking.ratio - 0.3 - epoch / 20) ** 2 - 0.01 * (masking.strategy == "random")
            checkpoint.write_text(f"{epoch} {learned!r}")
            outcome = result(epoch, learned)
            if epoch == until:
                end = "finished" if epoch == config.train.epochs else "paused"
                self.searcher.on_trial_complete(trial_id, {**outcome, end: "", "done": True})
            else:
                self.searcher.on_trial_result(trial_id, outcome)
            if is_killed(f"epoch {epoch} of {suggestion['number']}"):
                return False
        return True


def copies(store: TrialStore) -> list[FrozenTrial]:
    return [
        trial for trial in store.all_trials() if parent_number(trial) is not None and confirmed_number(trial) is None
    ]


def score_of_one_training(study: Study, values: dict[str, Any]) -> float:
    """What a single training of a configuration learns."""
    config = study.resolve(values)
    maskings = [(epoch, config_at(config, epoch - 1).masking) for epoch in range(1, config.train.epochs + 1)]
    learned = 0.0
    for epoch, masking in maskings:
        learned += 1 - (masking.ratio - 0.3 - epoch / 20) ** 2 - 0.01 * (masking.strategy == "random")
    return learned


def test_copies_replace_the_worst_and_every_lineage_is_a_configuration(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    driver = PopulationDriver(study, tmp_path)
    assert driver.run()
    trials = driver.store.all_trials()
    assert len(copies(driver.store)) == 3 and len(driver.store.explored()) == 6
    assert {status_of(trial) for trial in trials} == {TrialStatus.COMPLETE, TrialStatus.PRUNED}
    complete = [trial for trial in trials if status_of(trial) is TrialStatus.COMPLETE]
    assert len(complete) == 6
    for trial in complete:
        assert trial.value == score_of_one_training(study, trained_values(trial, params_of(trial)))
    copy = copies(driver.store)[-1]
    parent = trials[parent_number(copy) or 0]
    assert describe_copy(copy) == f"copy of {parent.number} at epoch 9"
    assert assignments(copy)[0]["reason"].startswith(f"copy of trial {parent.number}, place 1 of 6 at epoch 9")
    assert sorted(copy.intermediate_values) == [10, 11, 12]
    last = config_at(study.resolve(trained_values(copy, params_of(copy))), 11)
    assert last == study.resolve(params_of(copy)), "the copy's own values are those of its last epochs"
    stopped = [trial.user_attrs["stopped"] for trial in trials if status_of(trial) is TrialStatus.PRUNED]
    assert all("a copy of a better one replaces it" in reason for reason in stopped)


def test_a_search_that_is_killed_anywhere_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    points = set[str]()

    def killed_once(point: str) -> bool:
        fresh = point not in points
        points.add(point)
        return fresh and (point.startswith("copied") or sum(map(ord, point)) % 3 == 0)

    undisturbed = PopulationDriver(make_study(tmp_path / "a"), tmp_path / "a")
    assert undisturbed.run()
    drivers = [PopulationDriver(make_study(tmp_path / "b"), tmp_path / "b")]
    while not drivers[-1].run(killed_once):
        drivers.append(PopulationDriver(make_study(tmp_path / "b"), tmp_path / "b"))
    assert len(drivers) > 10
    assert decided(drivers[-1]) == decided(undisturbed)
    lineages = [[trial.user_attrs.get("lineage") for trial in d.store.all_trials()] for d in (drivers[-1], undisturbed)]
    assert lineages[0] == lineages[1]


def test_starting_points_are_members_that_pause_and_are_never_replaced(tmp_path: Path) -> None:
    study = make_study(tmp_path, start_from=[{"masking.ratio": 0.9}])
    driver = PopulationDriver(study, tmp_path)
    assert driver.run()
    first = driver.store.all_trials()[0]
    assert [piece["until"] for piece in assignments(first)] == [3, 6, 9, 12]
    assert status_of(first) is TrialStatus.COMPLETE
    assert first.value == min(trial.value for trial in driver.store.all_trials() if trial.value is not None)


def test_confirmations_repeat_the_schedule_of_a_lineage_with_another_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path, confirm={"top": 1, "seeds": 2}, pbt={"interval": 2}, start_from=[])
    driver = PopulationDriver(study, tmp_path)
    assert driver.run()
    trials = driver.store.all_trials()
    repeated = [trial for trial in trials if confirmed_number(trial) is not None]
    assert len(repeated) == 2
    best = trials[confirmed_number(repeated[0]) or 0]
    assert parent_number(best) is not None, "the best trial has changed its values"
    for trial in repeated:
        assert trial.user_attrs["result"] == [best.value]
        values = trained_values(trial, params_of(trial))
        assert values.pop("train.seed") in (1, 2)
        assert values == trained_values(best, params_of(best))
        assert assignments(trial)[0]["from"] == 0


def test_samplers_and_importances_ignore_copies(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=8)
    driver = PopulationDriver(study, tmp_path)
    assert driver.run()
    store = driver.store
    observed = list(Draft(study, store.optuna_study, store.all_trials())._observations())
    assert [trial.number for trial in observed] == [trial.number for trial in store.explored()]
    before = importances(store.optuna_study)
    assert before and copies(store)
    for trial in copies(store):
        assert trial.number not in {t.number for t in observed}


def test_a_copy_with_the_bases_values_is_not_the_default_configuration(tmp_path: Path) -> None:
    study = make_study(
        tmp_path, space={"masking.strategy": {"choice": ["random", "disjoint"]}}, num_trials=2, start_from=[]
    )
    driver = PopulationDriver(study, tmp_path)
    assert driver.run()
    store = driver.store
    for trial in store.all_trials():
        store.encoder_dir(trial.number).mkdir(parents=True, exist_ok=True)
    champion = leaderboard(store.optuna_study).entries[0].trial
    scored = {encoder.name: encoder for encoder in encoders_to_score(store)}
    assert scored["champion"].config == study.resolve(trained_values(champion, params_of(champion)))
    default = scored.get("default configuration")
    assert default is None or default.config == study.resolve({})


def test_copies_are_not_transferred_as_trials_of_their_last_values(tmp_path: Path) -> None:
    from csmae.trials.transfer import load_source_study, transfer_trials

    study = make_study(tmp_path)
    driver = PopulationDriver(study, tmp_path)
    assert driver.run()
    target = make_study(tmp_path, strategy="none")
    target = load_study(tmp_path / "study.yaml", "other")
    source = load_source_study(tmp_path / "studies.db", "study", target)
    store = TrialStore(target, tmp_path)
    assert transfer_trials(store, source).num_copied == 6
