"""The command ``sync``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from csmae.cli.main import main
from csmae.tracking.outbox import OUTBOX, Outbox, TrackingEvent

DEAD_SERVER = "http://127.0.0.1:9"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage folder with the outbox of a search."""
    outbox = Outbox(tmp_path / "masking" / OUTBOX)

    def add(kind: str, number: int | None, **body: Any) -> None:
        outbox.append(TrackingEvent(kind, number, 1_000, body))

    add("start", None, params={}, tags={}, primary_metric="val/f1_mean", direction="maximize")
    for number in range(3):
        add("trial", number, params={"masking.ratio": 0.3})
        for epoch in (1, 2):
            add("epoch", number, epoch=epoch, metrics={"val/f1_mean": epoch / 4, "train/loss": 1 / epoch})
        add("end", number, state="COMPLETE", reason=None, step=2, metrics={"budget/epochs": 2.0})
    add("finish", None, step=1, metrics={})
    outbox.close()
    return tmp_path


def test_sync_uploads_a_study_to_a_database(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("sync", "masking", "--storage", str(storage))
    uri = f"sqlite:///{storage}/mlflow.db"
    assert main([*command, "--mlflow-uri", uri]) == 0
    assert capsys.readouterr().out == f"masking is complete in {uri}\n"
    assert main([*command, "--mlflow-uri", DEAD_SERVER, "--timeout", "1"]) == 1
    assert capsys.readouterr().out == f"14 events of masking are not uploaded yet to {DEAD_SERVER}\n"


def test_a_missing_study_is_reported_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", "nothing", "--storage", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "is not the folder of a study: it has no outbox.jsonl" in line and line.count("\n") == 1
