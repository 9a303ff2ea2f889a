"""Weights & Biases behind the same outbox, offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from csmae.tracking.destination import check_uri
from csmae.tracking.outbox import Outbox, TrackingError, TrackingEvent
from csmae.tracking.tracker import Tracker
from csmae.trial_status import TrialStatus

pytest.importorskip("wandb", reason="the logger for Weights & Biases is an extra")

BLOCK, HEADER = 32768, 7


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(path: Path) -> Iterator[Any]:
    """The records of a run's file: LevelDB's log format, its values protocol buffers."""
    record = import_module("wandb.proto.wandb_internal_pb2").Record
    content, at, value = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        value += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield record.FromString(value)
            value = b""


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """By run, its group and F1 by step."""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        found: dict[str, Any] = {"points": []}
        for record in records(path):
            if record.HasField("run"):
                found |= {"name": record.run.display_name, "group": record.run.run_group}
            if record.HasField("history"):
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                found["points"].append((row["_step"], row["val/f1_mean"]))
        runs.setdefault(found["name"], {"points": [], "group": found["group"]})["points"] += found["points"]
    return runs


def test_a_study_is_a_group_of_runs_with_each_epoch_once(tmp_path: Path) -> None:
    folder = tmp_path / "masking"
    tracker = Tracker(folder, "masking", "wandb://csmae")
    tracker.start({"base.train.epochs": 3}, {"csmae.command": "python search.py"}, "val/f1_mean")
    for number in range(2):
        tracker.trial(number, {"masking.ratio": 0.5})
        for epoch in (1, 2, 3):
            tracker.epoch(number, epoch, {"val/f1_mean": number + epoch / 10, "train/loss": 1.0})
        tracker.end(number, TrialStatus.COMPLETE)
    tracker.finish({"budget/gpu_s": 1.0})
    assert tracker.close(60) == 0
    runs = stored(folder)
    assert {name: run["group"] for name, run in runs.items()} == dict.fromkeys(
        ("masking", "trial 0", "trial 1"), "masking"
    )
    assert runs["trial 0"]["points"] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert runs["trial 1"]["points"] == [(1, 1.1), (2, 1.2), (3, 1.3)]


def test_the_champion_is_an_artifact_and_late_files_are_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "masking"
    files = folder / "encoder"
    files.mkdir(parents=True)
    save_file({"w": np.ones(3, np.float32)}, files / "encoder.safetensors")
    (files / "config.json").write_text("{}")
    tracker = Tracker(folder, "masking", "wandb://csmae")
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(4, {"masking.ratio": 0.5})
    tracker.end(4, TrialStatus.COMPLETE)
    tracker.champion(4, files, {"val/f1_mean": 0.5}, {"csmae.data": "synthetic"})
    tracker.finish({})
    (folder / "report.html").write_text("<p>report</p>")
    tracker.artifact(None, folder / "report.html", "report")
    assert tracker.close(60) == 0
    sent = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/*.wandb"))
    assert b"encoder.safetensors" in sent
    assert list(folder.glob("wandb/offline-run-*/files/media/html/*.html"))


def test_rejected_events_are_reported_and_delay_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "masking"
    outbox = Outbox(folder / "outbox.jsonl")
    outbox.append(
        TrackingEvent(
            "encoder", 0, 1, {"encoder_dir": str(folder / "missing"), "tags": {}, "metrics": {}, "sha256": ""}
        )
    )
    outbox.append(TrackingEvent("decision", 0, 1, {}))
    outbox.append(TrackingEvent("end", 0, 1, {"state": "COMPLETE"}))
    outbox.close()
    tracker = Tracker(folder, "masking", "wandb://csmae")
    tracker.start({}, {}, "val/f1_mean")
    assert tracker.close(60) == 0
    assert tracker.rejected == [
        f"trial 0: encoder: {folder / 'missing'} no longer exists",
        "trial 0: this version knows no event of kind 'decision'",
        "trial 0: the event has no 'reason'",
    ]


@pytest.mark.parametrize("project", ["my project", "team/my project", "Prüfung (2)", "csmae"])
def test_a_project_may_have_any_name_that_weights_and_biases_accepts(project: str) -> None:
    check_uri(f"wandb://{project}")
    assert import_module("wandb").Settings(project=project.rpartition("/")[2]).project


@pytest.mark.parametrize("project", ["", " csmae", "a/b/c", "50%", "what?", "a:b", "a#b", "x" * 129])
def test_a_project_that_weights_and_biases_does_not_accept_is_rejected(project: str) -> None:
    with pytest.raises(TrackingError, match="must be wandb://PROJECT"):
        check_uri(f"wandb://{project}")


def test_an_error_inside_weights_and_biases_is_retried_and_not_a_rejection(tmp_path: Path) -> None:
    from csmae.tracking.wandb_sink import WandbSink

    class Failing(WandbSink):
        def _epoch(self, event: TrackingEvent) -> None:
            raise KeyError("settings")

    with pytest.raises(KeyError):
        Failing("csmae", tmp_path / "masking", "x").send([TrackingEvent("epoch", 0, 0, {"epoch": 1, "metrics": {}})])
