"""The tracker: what a search says about itself, kept in the study's folder first and shown in MLflow soon after."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from csmae.sqlite import SQLITE, sqlite_path, sqlite_url
from csmae.tracking.mlflow_database import check_file
from csmae.tracking.outbox import OUTBOX, Event, Outbox, TrackingError, UploadPosition
from csmae.tracking.provenance import provenance
from csmae.tracking.registry import checksum
from csmae.tracking.uploader import Sink, Uploader

Direction = Literal["maximize", "minimize"]
SPENT = {"time/worker_s": "budget/worker_s", "time/gpu_s": "budget/gpu_s"}
"""What an epoch says that it took, and the name of a trial's and the study's sum."""
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "wandb")
WANDB = "wandb://"


class Uploaded(NamedTuple):
    """What came of an upload."""

    num_interrupted: int
    """Events that are not sent and wait."""
    refused: list[str]
    """What the place did not take, and why."""


class Tracker:
    """One study's events. No call waits for a server; a server that fails is told of in one line of the log.

    Args:
        folder: The study's folder; the outbox is in it.
        study: Name of the experiment and of its parent run.
        uri: Of MLflow, such as ``sqlite:///runs/mlflow.db`` or ``http://localhost:5000``; ``wandb://PROJECT`` for
            Weights & Biases.

    Raises:
        TrackingError: A URI that MLflow does not know, a database of another program, or a folder in which another process runs this study.
    """

    def __init__(self, folder: Path, study: str, uri: str) -> None:
        shown(uri)
        check_file(sqlite_path(uri))
        self._uri = uri
        self._outbox = Outbox(folder / OUTBOX)
        self._epochs: dict[int, dict[int, int]] = {}  # trial, epoch: when
        self._kept: dict[int, Future[None]] = {}  # trial: whether the disk holds its last epoch
        self._spent: dict[int, dict[str, float]] = {}  # trial: sums
        self._num_finished = 0
        self._objective: dict[str, str] = {}
        self._recall()
        self._uploader = _uploader(self._outbox, study, uri)
        self._uploader.start()

    def _recall(self) -> None:
        for event in self._outbox.read(0, limit=1 << 62)[0]:
            if event.kind == "epoch" and event.number is not None:
                self._epochs.setdefault(event.number, {})[int(event.body["epoch"])] = event.time_ms
                self._spend(event.number, event.body["metrics"])
            self._num_finished += event.kind == "finish"

    def start(
        self, params: dict[str, object], tags: dict[str, str], primary_metric: str, direction: Direction = "maximize"
    ) -> None:
        """Open the study, or open it again.

        Args:
            params: What the study is, dotted names; the first value of each stays.
            tags: What may change from one start to the next; command, commit and versions are added.
            primary_metric: What the trials are compared by.
            direction: Whether large or small is good.
        """
        self._objective = {"primary_metric": primary_metric, "direction": direction}
        self._add("start", None, {"params": params, "tags": provenance() | tags, **self._objective})

    def trial(self, number: int, params: dict[str, object]) -> None:
        """Open a trial, or open it again after an interruption."""
        self._add("trial", number, {"params": params})

    def epoch(self, number: int, epoch: int, metrics: dict[str, float]) -> None:
        """Report an epoch; a second report of it is left out.

        It survives this process at once, and a power cut before the trial's next epoch is taken.
        """
        epochs = self._epochs.setdefault(number, {})
        if epoch not in epochs:
            if number in self._kept:
                self._kept[number].result()
            epochs[epoch], self._kept[number] = self._add(
                "epoch", number, {"epoch": epoch, "metrics": _floats(metrics)}
            )
            self._spend(number, metrics)

    def _spend(self, number: int, metrics: dict[str, float]) -> None:
        spent = self._spent.setdefault(number, {"budget/epochs": 0.0})
        spent["budget/epochs"] += 1
        for name, total in SPENT.items():
            if name in metrics:
                spent[total] = spent.get(total, 0.0) + float(metrics[name])

    def end(
        self, number: int, state: str, reason: str | None = None, tags: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Close a trial; its epochs, worker-seconds and GPU-seconds are summed up as ``budget/…``.

        Args:
            number: The trial.
            state: ``COMPLETE``, ``PRUNED``, ``FAIL``, or ``RUNNING`` for one that the search left in the middle.
            reason: Why it failed or was left.
            tags: Further ones, such as which trial it repeats.
        """
        step = max(self._epochs.get(number, {}), default=0)
        spent = {"step": step, "metrics": dict(self._spent.get(number, {}))}
        self._add("end", number, {"state": state, "reason": reason, "tags": dict(tags), **spent})

    def artifact(self, number: int | None, path: Path, artifact_path: str = "") -> None:
        """Show a file or folder with a trial, or with the study where ``number`` is None.

        Args:
            number: The trial.
            path: It must stay as it is until it is uploaded.
            artifact_path: The folder among the run's artifacts.
        """
        self._add("artifact", number, {"path": str(path.absolute()), "artifact_path": artifact_path})

    def encoder(self, number: int, encoder_dir: Path, metrics: dict[str, float], tags: dict[str, str]) -> None:
        """Keep a good trial's encoder as a logged model; arguments as of ``champion``."""
        self._add("encoder", number, self._encoder_body(number, encoder_dir, metrics, tags))

    def champion(
        self,
        number: int,
        encoder_dir: Path,
        metrics: dict[str, float],
        tags: dict[str, str],
        score: float | None = None,
    ) -> None:
        """Register the encoder of the study's champion, and let the aliases name it.

        The study's own alias moves to it whatever the scores of its trials are: the search has decided. The alias of all
        studies stays where another study's champion is better.

        Args:
            number: The trial.
            encoder_dir: Folder of ``encoder.safetensors`` and ``config.json``; must stay until uploaded.
            metrics: Its scores, the primary metric among them.
            tags: What the version says of itself; ``csmae.data`` names the data: scores compare only on the same.
            score: By which it compares with other studies' champions, such as the mean over seeds; by default its own
                primary metric.

        Raises:
            TrackingError: The folder holds no encoder.
        """
        body = self._encoder_body(number, encoder_dir, metrics, tags)
        self._add("champion", number, body if score is None else {**body, "score": float(score)})[1].result()

    def _encoder_body(
        self, number: int, encoder_dir: Path, metrics: dict[str, float], tags: dict[str, str]
    ) -> dict[str, object]:
        step, step_ms = max(self._epochs.get(number, {}).items(), default=(0, 0))
        return {
            "encoder_dir": str(encoder_dir.absolute()),
            "sha256": checksum(encoder_dir),
            "metrics": _floats(metrics),
            "tags": tags,
            **self._objective,
            "step": step,
            "step_ms": step_ms,  # a score that the epoch reported too is then the same point
        }

    def finish(self, summary: dict[str, float]) -> None:
        """Close the study with figures of its own; what its trials took together is added as ``budget/…``."""
        self._num_finished += 1
        budget: dict[str, float] = {}
        for spent in self._spent.values():
            for name, value in spent.items():
                budget[name] = budget.get(name, 0.0) + value
        self._add("finish", None, {"step": self._num_finished, "metrics": budget | _floats(summary)})[1].result()

    @property
    def page(self) -> str | None:
        """The study's page on a server, behind its address and ``/#``; None as long as no server has answered."""
        return self._uploader.page

    def close(self, timeout_s: float = 30.0) -> int:
        """Upload what is left, for so long at most.

        Returns:
            Events that are not uploaded, those refused left aside; they wait in the outbox for the next start.
        """
        return self._uploader.close(timeout_s)

    @property
    def place(self) -> str:
        """Who takes the events."""
        return "Weights & Biases" if self._uri.startswith(WANDB) else "MLflow"

    @property
    def refused(self) -> list[str]:
        """What the server did not take, and why; it is sent once more at the next start."""
        return self._uploader.refused

    def _add(self, kind: str, number: int | None, body: dict[str, object]) -> tuple[int, Future[None]]:
        """When it was, and what is done once it would survive a power cut."""
        event = Event(kind, number, time.time_ns() // 1_000_000, body)
        return event.time_ms, self._outbox.append(event)


def replay(folder: Path, uri: str, timeout_s: float, anew: bool = False) -> Uploaded:
    """Upload what the outbox of a study's folder still holds, and what was refused before.

    Args:
        folder: Of the study, whose name it bears.
        uri: Of MLflow.
        timeout_s: For so long at most.
        anew: Send everything again, as after a restored run; what is there stays as it is.

    Raises:
        TrackingError: No outbox there, a search is running on it, or an unknown URI.
    """
    if not (folder / OUTBOX).is_file():
        raise TrackingError(f"{folder}: no study: there is no {OUTBOX} in it: name a folder such as runs/masking")
    shown(uri)
    check_file(sqlite_path(uri))
    outbox = Outbox(folder / OUTBOX)
    uploader = _uploader(outbox, folder.name, uri)
    if anew:
        uploader.bookmark.move(0)
    uploader.start()
    return Uploaded(uploader.close(timeout_s), uploader.refused)


def tracking_uri(given: str | None, storage: Path, logger: str = "mlflow") -> str:
    """Where a study's events go.

    Args:
        given: What the user named: an MLflow URI, or with ``wandb`` a project or ``ENTITY/PROJECT``.
        storage: Folder of the studies.
        logger: ``mlflow`` or ``wandb``.

    Returns:
        With ``mlflow``, what was given, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the folder; with ``wandb``, the
        project ``csmae`` by default.

    Raises:
        TrackingError: With ``wandb``, an address of MLflow.
    """
    if logger == "wandb":
        project = (given or "csmae").removeprefix(WANDB)
        if "://" in project or project.startswith("sqlite:"):
            raise TrackingError(
                f"--logger wandb: --mlflow-uri must be a project or ENTITY/PROJECT, found {shown(project)}"
            )
        return WANDB + project
    return given or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(storage / "mlflow.db")


def shown(uri: str) -> str:
    """The URI without user and password, fit to be shown.

    Raises:
        TrackingError: It has no scheme that MLflow's stores know, or Weights & Biases is asked for and not installed.
    """
    if uri.startswith(WANDB):
        _check_project(uri)
        return uri
    parts = urlsplit(uri)
    if parts.scheme.partition("+")[0] not in SCHEMES:
        raise TrackingError(
            f"MLflow URI {uri!r}: must start with sqlite:///, postgresql://, http:// or https://; "
            "or wandb://PROJECT for Weights & Biases"
        )
    login, at, _ = parts.netloc.rpartition("@")
    return uri.replace(login + at, "", 1)


def _check_project(uri: str) -> None:
    if not re.fullmatch(r"([\w.-]+/)?[^/\\#?%:\s]([^/\\#?%:]{0,126}[^/\\#?%:\s])?", uri.removeprefix(WANDB)):
        raise TrackingError(
            f"{uri}: must be wandb://PROJECT or wandb://ENTITY/PROJECT; a project has up to 128 characters without / \\ # ? % :"
        )
    if not find_spec("wandb"):
        raise TrackingError(f"{uri}: Weights & Biases is not installed: pip install 'csmae[wandb]'")


def _uploader(outbox: Outbox, study: str, uri: str) -> Uploader:
    def connect() -> Sink:  # seconds of import, which the uploading thread has
        if uri.startswith(WANDB):
            from csmae.tracking.wandb_sink import WandbSink

            return WandbSink(uri.removeprefix(WANDB), outbox.path.parent, outbox.study_id)
        from csmae.tracking.mlflow_sink import MlflowSink

        return MlflowSink(uri, study, outbox.study_id)

    bookmark = UploadPosition(
        outbox.path.with_suffix(".uploaded"), outbox.study_id, _place(uri, outbox.folder), shown(uri)
    )
    return Uploader(outbox, bookmark, connect, shown(uri))


def _place(uri: str, folder: Path) -> str:
    """What a bookmark calls the place: a database in the storage of the study by a path that survives a move of it."""
    database = sqlite_path(uri)
    if database and database.absolute().is_relative_to(folder.parent):
        return f"{SQLITE}../{database.absolute().relative_to(folder.parent).as_posix()}"
    return shown(uri)


def _floats(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
