"""The outbox keeps what it accepted, whatever happens to the process, the disk's end or the server."""

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
from csmae.tracking.outbox import Event, Outbox, TrackingError, UploadPosition
from csmae.tracking.uploader import RefusedError, Sink, Uploader


def epoch(number: int, epoch: int, **metrics: float) -> Event:
    return Event("epoch", number, 1_700_000_000_000 + epoch, {"epoch": epoch, "metrics": metrics})


def test_events_come_back_as_they_went_in_nan_and_infinity_too(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    outbox.append(epoch(3, 1, loss=math.inf, f1=0.25))
    outbox.append(epoch(3, 2, loss=math.nan))
    events, _ = outbox.read(0, 10)
    assert events[1] == epoch(3, 1, loss=math.inf, f1=0.25)
    assert math.isnan(events[2].body["metrics"]["loss"])


def test_many_events_share_one_fsync_and_none_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, gate, kept = Outbox(tmp_path / "outbox.jsonl"), threading.Event(), []

    def slow(file: int) -> None:
        gate.wait(10)
        kept.append(os.fstat(file).st_size)

    monkeypatch.setattr(os, "fsync", slow)
    done = [outbox.append(epoch(0, number, loss=1.0)) for number in range(50)]
    sizes = outbox.path.stat().st_size
    assert not any(each.done() for each in done)
    gate.set()
    outbox.close()
    assert all(each.done() for each in done)
    assert kept[-1] == sizes
    assert len(kept) <= 2


def test_reading_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    for number in range(5):
        outbox.append(epoch(number, 1, loss=1.0))
    seen, offset = outbox.read(0, 2)
    while batch := outbox.read(offset, 2)[0]:
        seen += batch
        offset = outbox.read(offset, 2)[1]
    assert [event.number for event in seen] == [None, 0, 1, 2, 3, 4]
    assert outbox.count(offset) == 0


def test_a_torn_last_line_is_cut_and_the_study_keeps_its_identity(tmp_path: Path) -> None:
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


def test_a_damaged_line_in_the_middle_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_file_that_is_no_outbox_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "outbox.jsonl"
    path.write_bytes(epoch(0, 1).to_line())
    with pytest.raises(TrackingError, match="is not an outbox"):
        Outbox(path)


FULL_DISK = """
import logging, resource, signal, sys
from pathlib import Path
from csmae.tracking.outbox import Event, Outbox
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
outbox = Outbox(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
for number in range(20):
    outbox.append(Event("epoch", number, 0, {"epoch": 1, "metrics": {}}))
print(outbox.path.stat().st_size <= 1000, outbox.count(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
outbox.append(Event("epoch", 20, 0, {"epoch": 1, "metrics": {}}))
print([event.number for event in outbox.read(0, 100)[0]])
"""


def test_a_full_disk_ends_nothing_and_its_events_follow_when_there_is_room(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "outbox.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    full, room = done.stdout.splitlines()
    assert full == "True 20"
    assert room == str([None, *range(21)])
    assert done.stderr.count("cannot be written") == 1


def test_a_bookmark_is_kept_by_place_and_by_study(tmp_path: Path) -> None:
    path = tmp_path / "outbox.uploaded"
    UploadPosition(path, "study", "here").move(10)
    UploadPosition(path, "study", "there").move(20)
    assert UploadPosition(path, "study", "here").offset == 10
    assert UploadPosition(path, "study", "there").offset == 20
    assert UploadPosition(path, "another", "here").offset == 0


class Lossy:
    """A sink that fails in the middle of a batch, or after it when the answer is lost."""

    def __init__(self, sink: MlflowSink, fails_after: int) -> None:
        self.is_new, self.page, self._sink, self._fails_after = sink.is_new, sink.page, sink, fails_after

    def send(self, events: Sequence[Event]) -> None:
        self._sink.send(events[: self._fails_after])
        raise ConnectionError("lost")


class Searches(RuleBasedStateMachine):
    """Events, uploads, failures and crashes in any order; at the end all that was accepted is stored, once."""

    database: str

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=Path(self.database).parent))
        self.accepted: dict[tuple[int, int], float] = {}
        self.outbox = Outbox(self.folder / "outbox.jsonl")
        self.outbox.append(
            Event("start", None, 1, {"params": {"a": 1}, "tags": {}, "primary_metric": "f1", "direction": "maximize"})
        )

    def uploader(self, fails_after: int | None = None) -> Uploader:
        def connect() -> MlflowSink | Lossy:
            sink = MlflowSink(f"sqlite:///{self.database}", self.folder.name, self.outbox.study_id)
            return sink if fails_after is None else Lossy(sink, fails_after)

        bookmark = UploadPosition(self.folder / "outbox.uploaded", self.outbox.study_id, "here")
        return Uploader(self.outbox, bookmark, connect, "here")

    @rule(trial=st.integers(0, 2), value=st.floats(allow_infinity=False))
    def report(self, trial: int, value: float) -> None:
        number = len(self.accepted)
        if number == 0:
            self.outbox.append(Event("trial", trial, 1, {"params": {"b": trial}}))
        self.outbox.append(Event("epoch", trial, number, {"epoch": number, "metrics": {"f1": value}}))
        self.accepted[trial, number] = value

    @rule(trial=st.integers(0, 2))
    def end(self, trial: int) -> None:
        self.outbox.append(Event("end", trial, 1, {"state": "PRUNED", "reason": None, "step": 0, "metrics": {}}))

    @rule()
    def upload(self) -> None:
        self.uploader().step()

    @rule(fails_after=st.integers(0, 6))
    def fail(self, fails_after: int) -> None:
        uploader = self.uploader(fails_after)
        if self.outbox.count(uploader.bookmark.offset):
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
            key: repr(value + 0.0)  # SQLite knows no negative zero
            for key, value in self.accepted.items()
        }


def _stored(database: str, study: str) -> dict[tuple[int, int], str]:
    """Every stored point by trial and step; fails where there are two of one."""
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


def test_what_was_accepted_is_stored_once_whatever_fails(tmp_path: Path) -> None:
    machine = type("SearchesHere", (Searches,), {"database": str(tmp_path / "mlflow.db")})
    few = settings(
        max_examples=int(os.environ.get("CSMAE_EXAMPLES", "15")),
        stateful_step_count=12,
        deadline=None,
        phases=[Phase.generate],  # shrinking would take minutes: a database call a step
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=few)


class Picky:
    """A sink that never takes one event."""

    is_new, page = False, "/"

    def __init__(self, refuses: Sequence[int] = (1,)) -> None:
        self.taken: list[Event] = []
        self._refuses = refuses

    def send(self, events: Sequence[Event]) -> None:
        if any(event.number in self._refuses for event in events):
            raise RefusedError("no such run")
        self.taken.extend(events)


def test_one_refused_event_is_told_and_does_not_hold_up_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, sink = Outbox(tmp_path / "outbox.jsonl"), Picky()
    for number in range(4):
        outbox.append(epoch(number, 7, loss=1.0))
    uploader = Uploader(outbox, UploadPosition(tmp_path / "mark", outbox.study_id, "here"), lambda: sink, "here")
    with caplog.at_level(logging.WARNING):
        uploader.step()
    assert [event.number for event in sink.taken] == [None, 0, 2, 3]
    assert "here rejected trial 1, epoch 7: no such run" in caplog.text
    assert uploader.refused == ["trial 1: no such run"]


def test_what_was_refused_is_sent_once_more_at_each_start_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox, sink, mark = Outbox(tmp_path / "outbox.jsonl"), Picky(), tmp_path / "mark"
    for number in (1, 0, 1, 2):
        outbox.append(epoch(number, 7, loss=1.0))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            uploader = Uploader(outbox, UploadPosition(mark, outbox.study_id, "here"), lambda: sink, "here")
            uploader.step()
            assert uploader.refused == ["trial 1: no such run (2 events)"]
    assert len(caplog.messages) == 2
    assert [event.number for event in sink.taken] == [None, 0, 2]
    outbox.append(epoch(3, 7, loss=1.0))
    uploader = Uploader(outbox, UploadPosition(mark, outbox.study_id, "here"), lambda: Picky(refuses=()), "here")
    uploader.step()
    assert uploader.refused == []
    assert UploadPosition(mark, outbox.study_id, "here").refused == {}


class Repaired(Picky):
    """A sink that refuses the first event only: somebody restored the run then."""

    def send(self, events: Sequence[Event]) -> None:
        try:
            super().send(events)
        finally:
            self._refuses = ()


def test_a_start_that_was_refused_does_not_reopen_a_trial_that_has_ended(tmp_path: Path) -> None:
    outbox, mark = Outbox(tmp_path / "outbox.jsonl"), tmp_path / "mark"
    for number in (1, 2):
        outbox.append(Event("trial", number, 0, {}))
    Uploader(outbox, UploadPosition(mark, outbox.study_id, "here"), lambda: Picky(refuses=(1,)), "here").step()
    for number in (1, 2):
        outbox.append(epoch(number, 1, loss=1.0))
        outbox.append(Event("end", number, 0, {}))
    Uploader(outbox, UploadPosition(mark, outbox.study_id, "here"), lambda: Repaired(), "here").step()
    sink = Picky(refuses=())
    Uploader(outbox, UploadPosition(mark, outbox.study_id, "here"), lambda: sink, "here").step()
    assert [(event.kind, event.number) for event in sink.taken] == [("trial", 1), ("end", 1)]


class Dead:
    """A place that never answers; it counts how often it was asked."""

    def __init__(self) -> None:
        self.num_asked = 0

    def __call__(self) -> Sink:
        self.num_asked += 1
        raise ConnectionError("nobody there")


def test_a_dead_place_is_asked_ever_less_often_while_closing(tmp_path: Path) -> None:
    outbox, dead = Outbox(tmp_path / "outbox.jsonl"), Dead()
    outbox.append(epoch(0, 1, loss=1.0))
    uploader = Uploader(outbox, UploadPosition(tmp_path / "mark", outbox.study_id, "here"), dead, "here")
    uploader.start()
    before = time.monotonic()
    assert uploader.close(2.0) == 1
    assert time.monotonic() - before < 3
    assert 2 <= dead.num_asked <= 4
