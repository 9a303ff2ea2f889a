"""Which checkpoints and encoders stay on disk."""

from pathlib import Path
from typing import Any

import pytest

from csmae.study.study import Study
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.tuning.champion import encoders_to_score
from tests.tuning.test_searcher import make_searcher, make_study, result

pytestmark = pytest.mark.usefixtures("copied_database")


def test_checkpoints_of_all_but_the_best_are_removed(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=6, keep=2)
    searcher, _ = make_searcher(study, tmp_path)
    for index, score in enumerate((0.1, 0.5, 0.2, 0.6, 0.3)):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        run_dir = Path(suggestion["run_dir"])
        (run_dir / "encoder").mkdir(parents=True)
        (run_dir / "checkpoint.pt").touch()
        searcher.on_trial_complete(str(index), result(4, score, finished=True))
    kept = {path.parent.name for path in tmp_path.glob("study/trials/*/checkpoint.pt")}
    assert kept == {path.parent.name for path in tmp_path.glob("study/trials/*/encoder")} == {"0", "1", "3"}


def test_a_file_that_cannot_be_removed_does_not_stop_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=9, keep=1, start_from=[]), tmp_path)
    for index, score in enumerate((0.5, 0.1)):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        (Path(suggestion["run_dir"]) / "checkpoint.pt").mkdir(parents=True)  # a folder, which cannot be unlinked
        searcher.on_trial_complete(str(index), result(4, score, finished=True))
    assert searcher.search_end is None and isinstance(searcher.suggest("2"), dict)
    assert "checkpoint.pt: cannot be removed" in caplog.text


def test_a_confirmed_champion_keeps_its_encoder_when_the_study_is_extended(tmp_path: Path) -> None:
    def run(num_trials: int, scores: list[float]) -> Study:
        settings: dict[str, Any] = {"keep": 1, "sampler": "random", "confirm": {"top": 1, "seeds": 1}, "start_from": []}
        study = make_study(tmp_path, num_trials=num_trials, **settings)
        searcher, _ = make_searcher(study, tmp_path)
        for index, score in enumerate(scores):
            suggestion = searcher.suggest(str(index))
            assert isinstance(suggestion, dict)
            (Path(suggestion["run_dir"]) / "encoder").mkdir(parents=True)
            searcher.on_trial_complete(str(index), result(4, score, finished=True))
        return study

    run(2, [0.5, 0.4, 0.6])
    trial_store = TrialStore(run(3, [0.55, 0.2]), tmp_path)
    assert next((s.trial.number, s.scores) for s in leaderboard(trial_store.optuna_study).entries) == (0, (0.5, 0.6))
    assert [e.trial.number for e in encoders_to_score(trial_store) if e.trial] == [0]
