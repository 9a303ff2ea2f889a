"""Population based training on a real Ray: two worker groups train a population, and one training repeats its schedule."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from csmae.cluster.resources import ClusterResources, allocate
from csmae.cluster.session import ray_running
from csmae.settings import load_yaml, parse_config
from csmae.study.study import load_study
from csmae.training.trainer import pretrain
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.trial import assignments, parent_number, status_of
from csmae.tuning.champion import write_configuration
from csmae.tuning.driver import run_search
from csmae.tuning.events import SearchOutcome
from tests.conftest import SMALL
from tests.study.test_study import write
from tests.training.test_pauses import assert_same_state

RESOURCES = ClusterResources(((2, 0),), "this machine")

SPACE = {
    "masking.ratio": {"float": [0.3, 0.8]},
    "optim.lr": {"float": [1e-4, 1e-2], "log": True},
    "loss.mim_weight": {"float": [0.1, 4.0], "log": True},
}


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with ray_running(None, RESOURCES, verbose=False):
        yield


def test_one_training_repeats_bit_for_bit_what_a_lineage_of_copies_learned(tmp_path: Path) -> None:
    settings = {"strategy": "pbt", "num_trials": 4, "pbt": {"interval": 1}, "sampler": "random", "keep": 8}
    study = load_study(write(tmp_path, SPACE, SMALL, **settings))
    store = TrialStore(study, tmp_path)
    end = run_search(Budget(store), allocate(study.search, RESOURCES), lambda event: None)
    assert end.outcome is SearchOutcome.COMPLETED
    trials = store.all_trials()
    copies = [trial for trial in trials if parent_number(trial) is not None]
    assert copies and len(trials) == 4 + len(copies)
    assert {status_of(trial) for trial in trials} <= {TrialStatus.COMPLETE, TrialStatus.PRUNED}
    for copy in copies:
        start = assignments(copy)[0]["from"]
        assert start in (1, 2, 3) and min(copy.intermediate_values) == start + 1
    ranked = [entry.trial for entry in leaderboard(store.optuna_study).entries]
    lineage = next(trial for trial in ranked if trial in copies)
    config = parse_config(load_yaml(write_configuration(store, lineage)), "champion.yaml")
    assert config.train.changes
    scores = {epoch.number: epoch.metrics["val/f1_mean"] for epoch in pretrain(config, tmp_path / "repeated", "cpu")}
    assert {epoch: scores[epoch] for epoch in lineage.intermediate_values} == lineage.intermediate_values
    assert_same_state(store.run_dir(lineage.number), tmp_path / "repeated")
