"""What a search prints at its end, and which tracking URIs it rejects."""

from __future__ import annotations

from pathlib import Path

import pytest

from csmae.cli.finish import usage_lines
from csmae.tracking.destination import check_uri, tracking_uri
from csmae.tracking.outbox import TrackingError
from tests.cli.test_search import error_line
from tests.support.searches import write


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
