"""Searches whose ``train.epochs`` grows, with real trainings and without Ray: what continues, and from where."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from mlflow import MlflowClient
from ray.tune.search import Searcher

from csmae.config import Config
from csmae.storage.layout import CHECKPOINT
from csmae.study.study import Study, load_study
from csmae.training.trainer import pretrain
from csmae.trials.budget import Budget
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.trial import assignments, curve, params_of, status_of
from csmae.tuning.champion import encoders_to_score
from csmae.tuning.searcher import METRICS, StudySearcher
from csmae.tuning.strategy.base import Strategy
from tests.conftest import SMALL
from tests.support.promotion import Promotion
from tests.support.searches import start, write

pytestmark = pytest.mark.usefixtures("copied_database")

Piece = tuple[int, list[int]]
"""Number of a trial, and the epochs that were trained."""


def make_study(folder: Path, epochs: int, **search: Any) -> Study:
    optim = {**SMALL["optim"], "schedule": "constant", "cooldown_ratio": 0.25}
    base = {**SMALL, "optim": optim, "train": {"epochs": epochs}}
    settings = {"num_trials": 2, "sampler": "random", "strategy": "none", "start_from": [], **search}
    space = {"masking.ratio": {"float": [0.3, 0.7]}}
    (folder / "study.yaml").write_text(yaml.safe_dump({"base": base, "space": space, "search": settings}))
    return load_study(folder / "study.yaml")


def search(study: Study, folder: Path, strategy: Strategy | None = None, limit: int = 99) -> list[Piece]:
    """Train what the search proposes, one after the other, up to a number of pieces."""
    searcher = StudySearcher(Budget(TrialStore(study, folder)), lambda event: None, lambda: 1, strategy)
    pieces: list[Piece] = []
    while len(pieces) < limit and (suggestion := searcher.suggest("a")) != Searcher.FINISHED:
        assert isinstance(suggestion, dict)
        config, until = Config.model_validate(suggestion["config"]), suggestion["until"]
        result, trained = {}, []
        for epoch in pretrain(config, Path(suggestion["run_dir"]), until=until):
            trained.append(epoch.number)
            result = {"epoch": epoch.number} | {f"{METRICS}{name}": value for name, value in epoch.metrics.items()}
            searcher.on_trial_result("a", result)
        searcher.on_trial_complete("a", {**result, "finished" if until == config.train.epochs else "paused": True})
        pieces.append((suggestion["number"], trained))
    return pieces


def test_complete_trials_continue_from_their_checkpoints_and_are_confirmed_again(tmp_path: Path) -> None:
    confirm = {"top": 1, "seeds": 1}
    assert search(make_study(tmp_path, 2, confirm=confirm), tmp_path) == [(0, [1, 2]), (1, [1, 2]), (2, [1, 2])]
    longer = make_study(tmp_path, 4, confirm=confirm)
    before = TrialStore(longer, tmp_path)
    results = [entry.scores for entry in leaderboard(before.optuna_study).entries]
    assert all(len(scores) == 1 for scores in results) and len(results) == 2, "the leaderboard has results right away"
    assert search(longer, tmp_path, limit=1) == [(0, [3, 4])]
    # the driver is killed here, and another one resumes
    assert search(longer, tmp_path) == [(1, [3, 4]), (3, [1, 2, 3, 4])]
    trial_store = TrialStore(longer, tmp_path)
    trials = trial_store.all_trials()
    assert [status_of(trial).name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert [list(curve(trial)) for trial in trials[:2]] == 2 * [[1, 2, 3, 4]]
    assert [piece["until"] for piece in assignments(trials[0])] == [2, 4]
    best = leaderboard(trial_store.optuna_study).entries[0]
    assert best.num_seeds == 2 and encoders_to_score(trial_store)[-1].trial == best.trial


def test_a_trial_that_paused_before_its_cooldown_equals_one_that_was_long_from_the_start(tmp_path: Path) -> None:
    assert search(make_study(tmp_path, 4, num_trials=1), tmp_path, Promotion(4), limit=1) == [(0, [1])]
    longer = make_study(tmp_path, 6, num_trials=1)
    assert search(longer, tmp_path) == [(0, [2, 3, 4, 5, 6])]
    trial_store = TrialStore(longer, tmp_path)
    config = longer.resolve(params_of(trial_store.all_trials()[0]))
    whole = [epoch.metrics["val/f1_mean"] for epoch in pretrain(config, tmp_path / "whole")]
    assert [score for (score,) in curve(trial_store.all_trials()[0]).values()] == whole
    states = [
        torch.load(folder / CHECKPOINT, weights_only=True) for folder in (tmp_path / "whole", trial_store.run_dir(0))
    ]
    for part in ("model", "optimizer"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_a_trial_whose_checkpoint_is_gone_restarts_and_keeps_the_scores_that_it_had(tmp_path: Path) -> None:
    search(make_study(tmp_path, 2, num_trials=1), tmp_path)
    longer = make_study(tmp_path, 4, num_trials=1)
    trial_store = TrialStore(longer, tmp_path)
    before = curve(trial_store.all_trials()[0])
    (trial_store.run_dir(0) / CHECKPOINT).unlink()
    assert search(longer, tmp_path) == [(0, [1, 2, 3, 4])]
    after = curve(TrialStore(longer, tmp_path).all_trials()[0])
    assert list(after) == [1, 2, 3, 4] and {epoch: after[epoch] for epoch in (1, 2)} == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_finished_search_continues_on_a_real_ray_and_registers_the_new_champion(tmp_path: Path) -> None:
    write(tmp_path, strategy="none", confirm={"top": 1, "seeds": 1})

    def run(epochs: int) -> tuple[int, str]:
        status = start(tmp_path, "--set", f"train.epochs={epochs}").wait(400)
        return status, (tmp_path / "log").read_text()

    status, log = run(2)
    assert status == 0, log[-2000:]
    status, log = run(3)
    assert status == 0, log[-2000:]
    assert "note: train.epochs grows from 2 to 3: the learning rate of the remaining epochs follows the longer" in log
    status, log = run(2)
    assert status == 2 and "train.epochs 2 is less than the 3 epochs that trial 0 trained: set it to 3 or more" in log
    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/runs/studies.db").trials
    assert [status_of(trial).name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert [list(curve(trial)) for trial in trials[:2]] == 2 * [[1, 2, 3]]
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    versions = client.search_model_versions("name = 'csmae-encoder'")
    newest = client.get_model_version_by_alias("csmae-encoder", "champion-small")
    assert len(versions) == 2 and int(newest.version) == 2
    (run_of_first,) = client.search_runs([newest_experiment(client)], "tags.`csmae.run` = 'trial 0'")
    points = client.get_metric_history(run_of_first.info.run_id, "val/f1_mean")
    assert [point.step for point in points if point.step] == [1, 2, 3] and run_of_first.info.status == "FINISHED"


def newest_experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name("small")
    assert found is not None
    return str(found.experiment_id)
