"""The outbox keeps what it accepted, whatever happens to the process, the disk or the server."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from csmae.tracking.mlflow_sink import MlflowSink
from csmae.tracking.outbox import Outbox, TrackingError, TrackingEvent, UploadPosition
from csmae.tracking.sink import RejectedError, Sink
from csmae.tracking.uploader import Uploader


def epoch(number: int, epoch: int, **metrics: float) -> TrackingEvent:
    return TrackingEvent("epoch", number, 1_700_000_000_000 + epoch, {"epoch": epoch, "metrics": metrics})


def test_events_are_read_as_they_were_written_including_nan_and_infinity(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    outbox.append(epoch(3, 1, loss=math.inf, f1=0.25))
    outbox.append(epoch(3, 2, loss=math.nan))
    events, _ = outbox.read(0, 10)
    assert events[1] == epoch(3, 1, loss=math.inf, f1=0.25)
    assert math.isnan(events[2].body["metrics"]["loss"])


def test_many_events_share_one_fsync_and_none_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, gate, synced = Outbox(tmp_path / "outbox.jsonl"), threading.Event(), []

    def slow(file: int) -> None:
        gate.wait(10)
        synced.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", slow)
    futures = [outbox.append(epoch(0, number, loss=1.0)) for number in range(50)]
    size = outbox.path.stat().st_size
    assert not any(future.done() for future in futures)
    gate.set()
    outbox.close()
    assert all(future.done() for future in futures)
    assert synced[-1] == size
    assert len(synced) <= 2


def test_reading_continues_where_the_last_call_ended(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    for number in range(5):
        outbox.append(epoch(number, 1, loss=1.0))
    seen, offset = outbox.read(0, 2)
    while batch := outbox.read(offset, 2)[0]:
        seen += batch
        offset = outbox.read(offset, 2)[1]
    assert [event.number for event in seen] == [None, 0, 1, 2, 3, 4]
    assert outbox.count(offset) == 0


def test_a_torn_last_line_is_removed_and_the_study_keeps_its_identity(tmp_path: Path) -> None:
    path = tmp_path / "outbox.jsonl"
    first = Outbox(path)
    first.append(epoch(0, 1, loss=1.0))
    first.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "epoch", "num')
    second = Outbox(path)
    second.append(epoch(0, 2, loss=0.5))
    assert second.study_id == first.study_id
    assert second.read(0, 10)[0][1:] == [epoch(0, 1, loss=1.0), epoch(0, 2, loss=0.5)]


def test_a_damaged_line_in_the_middle_is_logged_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "outbox.jsonl"
    outbox = Outbox(path)
    outbox.close()
    with path.open("ab") as file:
        file.write(b"\0\0\0\0\n" + epoch(0, 2, loss=0.5).to_line())
    with caplog.at_level(logging.WARNING):
        assert Outbox(path).read(0, 10)[0][1:] == [epoch(0, 2, loss=0.5)]
    assert "damaged line" in caplog.text


def test_two_processes_cannot_write_one_outbox(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    with pytest.raises(TrackingError, match="another process writes"):
        Outbox(outbox.path)
    outbox.close()
    Outbox(outbox.path).close()


def test_a_file_that_is_not_an_outbox_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "outbox.jsonl"
    path.write_bytes(epoch(0, 1).to_line())
    with pytest.raises(TrackingError, match="is not an outbox"):
        Outbox(path)


FULL_DISK = """
import logging, resource, signal, sys
from pathlib import Path
from csmae.tracking.outbox import TrackingEvent, Outbox
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
outbox = Outbox(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
for number in range(20):
    outbox.append(TrackingEvent("epoch", number, 0, {"epoch": 1, "metrics": {}}))
print(outbox.path.stat().st_size <= 1000, outbox.count(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
outbox.append(TrackingEvent("epoch", 20, 0, {"epoch": 1, "metrics": {}}))
print([event.number for event in outbox.read(0, 100)[0]])
"""


def test_events_of_a_full_disk_are_written_when_there_is_space(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "outbox.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    full, after = done.stdout.splitlines()
    assert full == "True 20"
    assert after == str([None, *range(21)])
    assert done.stderr.count("cannot be written") == 1


def test_an_upload_position_belongs_to_a_destination_and_a_study(tmp_path: Path) -> None:
    path = tmp_path / "outbox.uploaded"
    UploadPosition(path, "study", "here").move(10)
    UploadPosition(path, "study", "there").move(20)
    assert UploadPosition(path, "study", "here").offset == 10
    assert UploadPosition(path, "study", "there").offset == 20
    assert UploadPosition(path, "another", "here").offset == 0


class Lossy:
    """A sink whose connection fails in the middle of a batch, or after it when the answer is lost."""

    def __init__(self, sink: MlflowSink, fails_after: int) -> None:
        self.is_new, self._sink, self._fails_after = sink.is_new, sink, fails_after

    def send(self, events: Sequence[TrackingEvent]) -> None:
        self._sink.send(events[: self._fails_after])
        raise ConnectionError("lost")


class Searches(RuleBasedStateMachine):
    """Events, uploads, failures and crashes in any order; at the end every accepted event is stored once."""

    database: str

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=Path(self.database).parent))
        self.accepted: dict[tuple[int, int], float] = {}
        self.outbox = Outbox(self.folder / "outbox.jsonl")
        self.outbox.append(
            TrackingEvent(
                "start", None, 1, {"params": {"a": 1}, "tags": {}, "primary_metric": "f1", "direction": "maximize"}
            )
        )

    def uploader(self, fails_after: int | None = None) -> Uploader:
        def connect() -> MlflowSink | Lossy:
            sink = MlflowSink(f"sqlite:///{self.database}", self.folder.name, self.outbox.study_id)
            return sink if fails_after is None else Lossy(sink, fails_after)

        position = UploadPosition(self.folder / "outbox.uploaded", self.outbox.study_id, "here")
        return Uploader(self.outbox, position, connect, "here")

    @rule(trial=st.integers(0, 2), value=st.floats(allow_infinity=False))
    def report(self, trial: int, value: float) -> None:
        number = len(self.accepted)
        if number == 0:
            self.outbox.append(TrackingEvent("trial", trial, 1, {"params": {"b": trial}}))
        self.outbox.append(TrackingEvent("epoch", trial, number, {"epoch": number, "metrics": {"f1": value}}))
        self.accepted[trial, number] = value

    @rule(trial=st.integers(0, 2))
    def end(self, trial: int) -> None:
        self.outbox.append(
            TrackingEvent("end", trial, 1, {"state": "PRUNED", "reason": None, "step": 0, "metrics": {}})
        )

    @rule()
    def upload(self) -> None:
        self.uploader().step()

    @rule(fails_after=st.integers(0, 6))
    def fail(self, fails_after: int) -> None:
        uploader = self.uploader(fails_after)
        if self.outbox.count(uploader.position.offset):
            with pytest.raises(ConnectionError):
                uploader.step()

    @rule(torn=st.binary(max_size=30))
    def crash(self, torn: bytes) -> None:
        self.outbox.close()
        with self.outbox.path.open("ab") as file:
            file.write(torn.replace(b"\n", b""))
        self.outbox = Outbox(self.outbox.path)

    def teardown(self) -> None:
        uploader = self.uploader()
        while uploader.step():
            pass
        self.outbox.close()
        assert _stored(self.database, self.folder.name) == {
            key: repr(value + 0.0)  # SQLite has no negative zero
            for key, value in self.accepted.items()
        }


def _stored(database: str, study: str) -> dict[tuple[int, int], str]:
    """Every stored point by trial and step; fails on duplicates."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name(study)
    runs = client.search_runs([experiment.experiment_id])
    names = [run.info.run_name for run in runs]
    assert len(names) == len(set(names))
    points: dict[tuple[int, int], str] = {}
    for run in runs:
        for metric in client.get_metric_history(run.info.run_id, "f1"):
            key = int(run.data.tags["csmae.run"].removeprefix("trial ")), metric.step
            assert key not in points
            points[key] = repr(metric.value)
    return points


def test_every_accepted_event_is_stored_once_whatever_fails(tmp_path: Path) -> None:
    machine = type("SearchesInFolder", (Searches,), {"database": str(tmp_path / "mlflow.db")})
    example_settings = settings(
        max_examples=int(os.environ.get("CSMAE_EXAMPLES", "15")),
        stateful_step_count=12,
        deadline=None,
        phases=[Phase.generate],  # shrinking would take minutes: each step calls a database
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=example_settings)


class Picky:
    """A sink that rejects the events of some trials."""

    is_new = False

    def __init__(self, rejects: Sequence[int] = (1,)) -> None:
        self.accepted: list[TrackingEvent] = []
        self._rejects = rejects

    def send(self, events: Sequence[TrackingEvent]) -> None:
        if any(event.number in self._rejects for event in events):
            raise RejectedError("no such run")
        self.accepted.extend(events)


def test_a_rejected_event_is_logged_and_does_not_delay_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, sink = Outbox(tmp_path / "outbox.jsonl"), Picky()
    for number in range(4):
        outbox.append(epoch(number, 7, loss=1.0))
    uploader = Uploader(outbox, UploadPosition(tmp_path / "position", outbox.study_id, "here"), lambda: sink, "here")
    with caplog.at_level(logging.WARNING):
        uploader.step()
    assert [event.number for event in sink.accepted] == [None, 0, 2, 3]
    assert "here rejected trial 1, epoch 7: no such run" in caplog.text
    assert uploader.rejected == ["trial 1: no such run"]


def test_rejected_events_are_retried_at_each_start_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, sink, position_file = Outbox(tmp_path / "outbox.jsonl"), Picky(), tmp_path / "position"
    for number in (1, 0, 1, 2):
        outbox.append(epoch(number, 7, loss=1.0))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            uploader = Uploader(outbox, UploadPosition(position_file, outbox.study_id, "here"), lambda: sink, "here")
            uploader.step()
            assert uploader.rejected == ["trial 1: no such run (2 events)"]
    assert len(caplog.messages) == 2
    assert [event.number for event in sink.accepted] == [None, 0, 2]
    outbox.append(epoch(3, 7, loss=1.0))
    uploader = Uploader(
        outbox, UploadPosition(position_file, outbox.study_id, "here"), lambda: Picky(rejects=()), "here"
    )
    uploader.step()
    assert uploader.rejected == []
    assert UploadPosition(position_file, outbox.study_id, "here").rejected == {}


class Repaired(Picky):
    """A sink that rejects only the first call: then somebody restored the run."""

    def send(self, events: Sequence[TrackingEvent]) -> None:
        try:
            super().send(events)
        finally:
            self._rejects = ()


def test_a_rejected_start_that_is_retried_does_not_reopen_an_ended_trial(tmp_path: Path) -> None:
    outbox, position_file = Outbox(tmp_path / "outbox.jsonl"), tmp_path / "position"
    for number in (1, 2):
        outbox.append(TrackingEvent("trial", number, 0, {}))
    Uploader(outbox, UploadPosition(position_file, outbox.study_id, "here"), lambda: Picky(rejects=(1,)), "here").step()
    for number in (1, 2):
        outbox.append(epoch(number, 1, loss=1.0))
        outbox.append(TrackingEvent("end", number, 0, {}))
    Uploader(outbox, UploadPosition(position_file, outbox.study_id, "here"), lambda: Repaired(), "here").step()
    sink = Picky(rejects=())
    Uploader(outbox, UploadPosition(position_file, outbox.study_id, "here"), lambda: sink, "here").step()
    assert [(event.kind, event.number) for event in sink.accepted] == [("trial", 1), ("end", 1)]


class Dead:
    """A server that never answers; counts the attempts."""

    def __init__(self) -> None:
        self.num_attempts = 0

    def __call__(self) -> Sink:
        self.num_attempts += 1
        raise ConnectionError("no server")


def test_a_dead_server_is_contacted_less_and_less_often_while_closing(tmp_path: Path) -> None:
    outbox, dead = Outbox(tmp_path / "outbox.jsonl"), Dead()
    outbox.append(epoch(0, 1, loss=1.0))
    uploader = Uploader(outbox, UploadPosition(tmp_path / "position", outbox.study_id, "here"), dead, "here")
    uploader.start()
    before = time.monotonic()
    assert uploader.close(2.0) == 1
    assert time.monotonic() - before < 3
    assert 2 <= dead.num_attempts <= 4
