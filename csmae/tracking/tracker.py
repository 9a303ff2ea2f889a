"""The tracker: writes a search's events to the study's outbox, from where they are uploaded to MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

from csmae.sqlite import SQLITE, sqlite_path
from csmae.tracking.destination import WANDB, check_uri, redacted
from csmae.tracking.outbox import ALL, OUTBOX, Outbox, TrackingError, TrackingEvent, UploadPosition
from csmae.tracking.registry import checksum
from csmae.tracking.sink import Sink
from csmae.tracking.uploader import Uploader
from csmae.trial_status import TrialStatus

Direction = Literal["maximize", "minimize"]
COSTS = {"time/worker_s": "budget/worker_s", "time/gpu_s": "budget/gpu_s"}
"""Metrics of an epoch, and the name of their sum over a trial and over the study."""


class Uploaded(NamedTuple):
    """Result of ``upload``."""

    num_unsent: int
    """Events that are not uploaded and wait in the outbox."""
    rejected: list[str]
    """What the destination rejected, and why."""


class Tracker:
    """Writes one study's events. No call waits for a server; a server's failure costs one line in the log.

    Lives in the driver, with an upload thread.

    Args:
        folder: The study's folder, which holds the outbox.
        study: Name of the experiment and of its parent run.
        uri: Such as ``sqlite:///runs/mlflow.db`` or ``http://localhost:5000``; ``wandb://PROJECT`` for Weights & Biases.

    Raises:
        TrackingError: No events can be sent to the URI, or another process runs this study.
    """

    def __init__(self, folder: Path, study: str, uri: str) -> None:
        check_uri(uri)
        self.shown_uri = redacted(uri)
        """The URI without user and password."""
        self._outbox = Outbox(folder / OUTBOX)
        self._epoch_times: dict[int, dict[int, int]] = {}
        """By trial and epoch, when it was reported."""
        self._fsyncs: dict[int, Future[None]] = {}
        """By trial, done when its last epoch would survive a power failure."""
        self._costs: dict[int, dict[str, float]] = {}
        """By trial, its sums."""
        self._num_finished = 0
        self._objective: dict[str, str] = {}
        self._restore()
        self._uploader = _uploader(self._outbox, study, uri)
        self._uploader.start()

    def _restore(self) -> None:
        """Read what earlier runs of the search reported."""
        for event in self._outbox.read(0, ALL)[0]:
            if event.kind == "epoch" and event.number is not None:
                self._epoch_times.setdefault(event.number, {})[int(event.body["epoch"])] = event.time_ms
                self._add_costs(event.number, event.body["metrics"])
            self._num_finished += event.kind == "finish"

    def start(
        self, params: dict[str, object], tags: dict[str, str], primary_metric: str, direction: Direction = "maximize"
    ) -> None:
        """Report that a search starts or resumes the study.

        Args:
            params: The study's definition, by dotted name; the first value of each stays.
            tags: Tags that may differ between runs of the search, such as the command.
            primary_metric: Metric by which the trials compare.
            direction: Whether large or small values are good.
        """
        self._objective = {"primary_metric": primary_metric, "direction": direction}
        self._append("start", None, {"params": params, "tags": tags, **self._objective})

    def trial(self, number: int, params: dict[str, object]) -> None:
        """Report that a trial starts, or resumes after an interruption."""
        self._append("trial", number, {"params": params})

    def epoch(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        """Report an epoch; a second report of the same epoch is ignored.

        The event survives a kill of this process immediately, and a power failure before the trial's next epoch is accepted.
        """
        times = self._epoch_times.setdefault(number, {})
        if epoch not in times:
            if number in self._fsyncs:
                self._fsyncs[number].result()
            body: dict[str, object] = {"epoch": epoch, "metrics": _floats(metrics)}
            times[epoch], self._fsyncs[number] = self._append("epoch", number, body)
            self._add_costs(number, metrics)

    def _add_costs(self, number: int, metrics: dict[str, float]) -> None:
        costs = self._costs.setdefault(number, {"budget/epochs": 0.0})
        costs["budget/epochs"] += 1
        for name, total in COSTS.items():
            if name in metrics:
                costs[total] = costs.get(total, 0.0) + float(metrics[name])

    def end(
        self, number: int, state: TrialStatus, reason: str | None = None, tags: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Report that a trial ended, with the sums of its epochs, worker-seconds and GPU-seconds as ``budget/…``.

        Args:
            number: The trial.
            state: COMPLETE, PRUNED, FAIL, or RUNNING for an interrupted trial.
            reason: Why it failed or was interrupted.
            tags: Further tags, such as which trial it confirms.
        """
        step = max(self._epoch_times.get(number, {}), default=0)
        costs = {"step": step, "metrics": dict(self._costs.get(number, {}))}
        self._append("end", number, {"state": state, "reason": reason, "tags": dict(tags), **costs})

    def artifact(self, number: int | None, path: Path, artifact_path: str = "") -> None:
        """Attach a file or folder to a trial, or to the study where ``number`` is None.

        Args:
            number: The trial.
            path: Must not change until it is uploaded.
            artifact_path: The folder among the run's artifacts.
        """
        self._append("artifact", number, {"path": str(path.absolute()), "artifact_path": artifact_path})

    def encoder(self, number: int, encoder_dir: Path, metrics: dict[str, float], tags: dict[str, str]) -> None:
        """Store a good trial's encoder as a logged model; see ``champion`` for the arguments."""
        self._append("encoder", number, self._encoder_body(number, encoder_dir, metrics, tags))

    def champion(
        self,
        number: int,
        encoder_dir: Path,
        metrics: dict[str, float],
        tags: dict[str, str],
        score: float | None = None,
    ) -> None:
        """Register the encoder of the study's champion, and move the aliases to it.

        The study's own alias always moves: the search has decided. The alias of all studies stays where another study's
        champion is better.

        Args:
            number: The trial.
            encoder_dir: Folder of ``encoder.safetensors`` and ``config.json``; must not change until uploaded.
            metrics: Its scores, including the primary metric.
            tags: Tags of the model version; ``csmae.data`` names the data: scores compare only on the same data.
            score: Compares with other studies' champions, such as the mean over seeds; by default the primary metric.

        Raises:
            TrackingError: The folder does not hold an encoder.
        """
        body = self._encoder_body(number, encoder_dir, metrics, tags)
        self._append("champion", number, body if score is None else {**body, "score": float(score)})[1].result()

    def _encoder_body(
        self, number: int, encoder_dir: Path, metrics: dict[str, float], tags: dict[str, str]
    ) -> dict[str, object]:
        step, step_ms = max(self._epoch_times.get(number, {}).items(), default=(0, 0))
        return {
            "encoder_dir": str(encoder_dir.absolute()),
            "sha256": checksum(encoder_dir),
            "metrics": _floats(metrics),
            "tags": tags,
            **self._objective,
            "step": step,
            "step_ms": step_ms,  # makes a score that the epoch reported too the same point
        }

    def finish(self, summary: dict[str, float]) -> None:
        """Report that the search is finished, with its summary and the trials' sums as ``budget/…``."""
        self._num_finished += 1
        costs: dict[str, float] = {}
        for trial_costs in self._costs.values():
            for name, value in trial_costs.items():
                costs[name] = costs.get(name, 0.0) + value
        self._append("finish", None, {"step": self._num_finished, "metrics": costs | _floats(summary)})[1].result()

    def close(self, timeout_s: float = 30.0) -> int:
        """Upload the remaining events for at most ``timeout_s`` seconds.

        Returns:
            Number of events that are not uploaded, without the rejected ones; they wait in the outbox for the next start.
        """
        return self._uploader.close(timeout_s)

    @property
    def destination(self) -> str:
        """The service that gets the events."""
        return "Weights & Biases" if self.shown_uri.startswith(WANDB) else "MLflow"

    @property
    def rejected(self) -> list[str]:
        """What the server rejected, and why; it is sent once more at the next start."""
        return self._uploader.rejected

    def _append(self, kind: str, number: int | None, body: dict[str, object]) -> tuple[int, Future[None]]:
        """Append an event; returns its time and a future that is done once it would survive a power failure."""
        event = TrackingEvent(kind, number, time.time_ns() // 1_000_000, body)
        return event.time_ms, self._outbox.append(event)


def upload(folder: Path, uri: str, timeout_s: float, again: bool = False) -> Uploaded:
    """Upload what the outbox of a study's folder still holds, and what was rejected before.

    Args:
        folder: The study's folder, named after the study.
        uri: The destination, as for ``Tracker``.
        timeout_s: Longest time to try, seconds.
        again: Send everything again, such as after a run was restored; what the server has does not change.

    Raises:
        TrackingError: The folder has no outbox, a search is running on it, or no events can be sent to the URI.
    """
    if not (folder / OUTBOX).is_file():
        raise TrackingError(
            f"{folder}: is not the folder of a study: it has no {OUTBOX}: name a folder such as runs/masking"
        )
    check_uri(uri)
    outbox = Outbox(folder / OUTBOX)
    uploader = _uploader(outbox, folder.name, uri)
    if again:
        uploader.position.move(0)
    uploader.start()
    return Uploaded(uploader.close(timeout_s), uploader.rejected)


def _uploader(outbox: Outbox, study: str, uri: str) -> Uploader:
    def connect() -> Sink:  # the upload thread spends the seconds of the import
        if uri.startswith(WANDB):
            from csmae.tracking.wandb_sink import WandbSink

            return WandbSink(uri.removeprefix(WANDB), outbox.path.parent, outbox.study_id)
        from csmae.tracking.mlflow_sink import MlflowSink

        return MlflowSink(uri, study, outbox.study_id)

    path = outbox.path.with_suffix(".uploaded")
    position = UploadPosition(path, outbox.study_id, _position_key(uri, outbox.folder))
    return Uploader(outbox, position, connect, redacted(uri))


def _position_key(uri: str, folder: Path) -> str:
    """The destination in the file of upload positions: a database beside the studies by a path that survives a move."""
    database = sqlite_path(uri)
    if database and database.absolute().is_relative_to(folder.parent):
        return f"{SQLITE}../{database.absolute().relative_to(folder.parent).as_posix()}"
    return redacted(uri)


def _floats(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
