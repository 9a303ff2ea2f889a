"""The file of metrics: one line per epoch, also after kills and resumes, with full disks and in buckets."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from csmae.training.history import HISTORY, append_metrics, read_curves
from csmae.training.trainer import pretrain
from tests.conftest import small_config


def test_a_training_records_every_epoch_also_after_a_resume(tmp_path: Path) -> None:
    config = small_config(train__epochs=3)
    first = pretrain(config, tmp_path)
    losses = [next(first).metrics["train/loss"]]
    first.close()
    losses += [epoch.metrics["train/loss"] for epoch in pretrain(config, tmp_path)]
    assert read_curves(tmp_path)["train/loss"] == dict(enumerate(losses, start=1))


def test_an_epoch_that_is_trained_again_counts_once(tmp_path: Path) -> None:
    for epoch, loss in ((1, 3.0), (2, 2.0), (2, 1.5), (3, math.nan)):
        append_metrics(tmp_path, epoch, {"train/loss": loss})
    curve = read_curves(tmp_path)["train/loss"]
    assert {epoch: curve[epoch] for epoch in (1, 2)} == {1: 3.0, 2: 1.5}
    assert math.isnan(curve[3])
    append_metrics(tmp_path, 1, {"train/loss": 4.0})
    assert read_curves(tmp_path) == {"train/loss": {1: 4.0}}


def test_a_damaged_line_is_skipped_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    append_metrics(tmp_path, 1, {"train/loss": 1.0})
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"epoch": 2, "train/l\n')
    append_metrics(tmp_path, 2, {"train/loss": 0.5})
    assert read_curves(tmp_path) == {"train/loss": {1: 1.0, 2: 0.5}}


def test_a_hard_link_to_the_file_keeps_its_content(tmp_path: Path) -> None:
    append_metrics(tmp_path, 1, {"train/loss": 1.0})
    link = tmp_path / "link"
    link.hardlink_to(tmp_path / HISTORY)
    before = link.read_bytes()
    append_metrics(tmp_path, 2, {"train/loss": 0.5})
    assert link.read_bytes() == before


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / HISTORY).mkdir()
    with caplog.at_level(logging.WARNING):
        append_metrics(tmp_path, 2, {"train/loss": 1.0})
    assert "metrics.jsonl: cannot be written" in caplog.text
