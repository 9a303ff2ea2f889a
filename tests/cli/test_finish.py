"""What a search prints at its end, and which tracking URIs it rejects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csmae.cli.finish import finish, usage_lines
from csmae.cluster.resources import Allocation
from csmae.tracking.destination import check_uri, tracking_uri
from csmae.tracking.outbox import OUTBOX, TrackingError
from csmae.tracking.tracker import Tracker
from csmae.trials.store import TrialStore
from tests.cli.test_search import error_line
from tests.support.searches import write
from tests.trials.test_longer import make_study, trained


def test_with_weights_and_biases_mlflow_is_not_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "masking"
    monkeypatch.delenv("WANDB_MODE", raising=False)
    lines = list(usage_lines("wandb://team/csmae", folder, folder / "trials" / "3" / "encoder"))
    assert lines == [
        f'load it:  csmae.load_encoder("{folder}/trials/3/encoder")',
        "compare:  project team/csmae of Weights & Biases, group masking",
    ]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert f"send:     wandb sync {folder}/wandb/offline-run-*" in usage_lines("wandb://csmae", folder, folder)


def test_with_mlflow_the_alias_and_page_of_the_study_are_named(tmp_path: Path) -> None:
    lines = list(usage_lines("http://server:5000", tmp_path / "masking", tmp_path))
    assert lines[0] == 'load it:  csmae.load_encoder("models:/csmae-encoder@champion-masking")'
    assert lines[1:] == ["          with MLFLOW_TRACKING_URI=http://server:5000", "compare:  http://server:5000"]


@pytest.mark.parametrize("given", ["sqlite:///runs/mlflow.db", "http://server:5000", "wandb://http://server"])
def test_an_mlflow_uri_is_not_a_project_of_weights_and_biases(given: str) -> None:
    with pytest.raises(TrackingError, match="--mlflow-uri must be a project or ENTITY/PROJECT"):
        tracking_uri(given, Path("runs"), "wandb")


@pytest.mark.parametrize("uri", ["wandb://", "wandb:///csmae", "wandb://a/b/c"])
def test_a_project_without_a_name_is_rejected(uri: str) -> None:
    with pytest.raises(TrackingError, match="must be wandb://PROJECT or wandb://ENTITY/PROJECT"):
        check_uri(uri)


def test_an_invalid_tracking_uri_is_rejected_before_anything_is_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write(tmp_path)), "--storage", str(tmp_path / "runs"), "--dry-run"]
    assert "or wandb://PROJECT" in error_line([*words, "--mlflow-uri", "ftp://server"], capsys)
    assert "must be a project" in error_line([*words, "--logger", "wandb", "--mlflow-uri", "http://server"], capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("copied_database")
def test_the_champion_of_shorter_trainings_stays_registered_until_a_trial_is_complete_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path, [0.4, 0.6, 0.5]).record_champion(1, 0.6, 1)
    trial_store = TrialStore(make_study(tmp_path, 8), tmp_path)
    tracker = Tracker(trial_store.folder, "study", "http://127.0.0.1:9")
    try:
        assert finish(trial_store, tracker, Allocation(1, 1, 1.0, 0.0))
    finally:
        tracker.close(0.0)
    events = [json.loads(line) for line in (trial_store.folder / OUTBOX).read_text().splitlines()]
    assert {event["kind"] for event in events} == {"outbox", "artifact"}, (
        "neither a champion nor an encoder is reported"
    )
    printed = capsys.readouterr().out
    assert "champion: trial 1 stays registered: no trial has completed 8 epochs yet" in printed
    assert "best trials" in printed and (trial_store.folder / "report.html").exists()
