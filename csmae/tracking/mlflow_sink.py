"""MLflow as a sink: one experiment and one parent run per study, one child run per trial, found again by their tags."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from csmae.config import one_line
from csmae.tracking.destination import redacted
from csmae.tracking.mlflow_database import STUDY_ID, artifact_location, open_client, quiet_mlflow, update_locations
from csmae.tracking.outbox import TrackingError, TrackingEvent
from csmae.tracking.registry import Registry, all_pages
from csmae.tracking.sink import RejectedError, dispatch, readable, run_name
from csmae.trial_status import TrialStatus

quiet_mlflow()

from mlflow.entities import Metric, Param, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.utils.credentials import get_default_host_creds  # noqa: E402
from mlflow.utils.rest_utils import http_request  # noqa: E402

RUN, STATE, REASON = "csmae.run", "csmae.state", "csmae.reason"
STUDY = run_name(None)
"""Tag ``RUN`` of the parent run."""
CHAMPION = "csmae.champion"
"""Tag of the champion's run, and of the parent run, where it names the champion's."""
PRIMARY_METRIC = "mlflow.experiment.primaryMetric"
VIEW_TAG = "mlflow.sharedViewState.trials"
STATUS = {
    TrialStatus.COMPLETE: "FINISHED",
    TrialStatus.PRUNED: "KILLED",
    TrialStatus.FAIL: "FAILED",
    TrialStatus.RUNNING: "KILLED",
}
"""MLflow's status by a trial's state; RUNNING is an interrupted trial."""
MAX_VALUE = 6000
"""Characters of a parameter or tag; MLflow accepts 6,000 and 8,000."""
MAX_METRICS, MAX_PARAMS = 1000, 100
"""Per request."""
OLDEST_SERVER = (3, 11)
"""Older servers have known security holes: CVE-2026-2614, CVE-2026-2652, CVE-2026-0545."""

Item = TypeVar("Item")


def check_server(uri: str) -> None:
    """Reject a tracking server that is known to be unsafe; one that does not report its version is accepted.

    Raises:
        MlflowException: It is too old, or does not answer.
    """
    if not uri.startswith("http"):
        return
    answer = http_request(get_default_host_creds(uri), "/version", "GET").text
    version = re.match(r"(\d+)\.(\d+)\.\d+", answer)
    if version and tuple(map(int, version.groups())) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise MlflowException(
            f"runs MLflow {version[0]}, which has known security holes: update it to {oldest} or later"
        )


def ping(uri: str) -> None:
    """Request one experiment from a server or database.

    Raises:
        Exception: It does not answer, or answers with an error.
    """
    check_server(uri)
    open_client(uri).search_experiments(max_results=1)


def view(metric: str, larger_is_better: bool) -> dict[str, Any]:
    """State of MLflow's table of runs, which its pages read from a tag: best first, the metric beside the parameters."""
    column = f"metrics.`{metric}`"
    return {
        "searchFilter": "",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "orderByKey": column,
        "orderByAsc": not larger_is_better,
        "selectedColumns": ["attributes.`Models`", column],
    }


def view_path(experiment: str) -> str:
    """The table's page on an MLflow server, after its address and ``/#``."""
    return f"/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=trials"


class MlflowSink:
    """Stores a study's events in MLflow. Lives in the upload thread of the driver.

    Args:
        uri: Tracking server or database.
        study: Name of the experiment and of the parent run.
        study_id: Distinguishes this study from another one of the same name.

    Raises:
        MlflowException: The server does not answer, or its experiment is deleted or belongs to another study.
    """

    def __init__(self, uri: str, study: str, study_id: str) -> None:
        self._study, self._study_id = study, study_id
        self._environment = f"MLFLOW_TRACKING_URI={shlex.quote(redacted(uri))}"
        check_server(uri)
        self._client = open_client(uri)
        self._runs: dict[str, Any] = {}
        """By the value of the tag ``RUN``."""
        self._view: dict[str, Any] = {}
        self._metrics: dict[str, list[Metric]] = {}
        """By run, metrics of epochs that are not sent yet."""
        self.is_new = not self._find_experiment()
        update_locations(uri, study)
        if self.is_new:
            tags = {STUDY_ID: study_id, "mlflow.experimentKind": "custom_model_development"}
            self._experiment = str(self._client.create_experiment(study, artifact_location(uri, study), tags))
        self._registry = Registry(self._client, self._experiment, study)
        self._load_runs()

    def _find_experiment(self) -> bool:
        found = self._client.get_experiment_by_name(self._study)
        if found is None:
            return False
        if found.lifecycle_stage == "deleted":
            command = f"`mlflow experiments restore -x {found.experiment_id}`, {self._environment}"
            raise MlflowException(f"experiment {self._study!r} is deleted: restore it with {command}")
        if found.tags.get(STUDY_ID) != self._study_id:
            raise MlflowException(f"experiment {self._study!r} is another study's: give this one another --name")
        self._experiment = str(found.experiment_id)
        self._view = json.loads(found.tags.get(VIEW_TAG, "{}"))
        return True

    def send(self, events: Sequence[TrackingEvent]) -> None:
        """Store events, with one request for the epochs of a run between two other events."""
        self._metrics = {}  # of an attempt that failed
        try:
            for event in events:
                if event.kind != "epoch":
                    self._send_metrics()
                dispatch(self, event)
            self._send_metrics()
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise RejectedError(one_line(error, 300)) from error
            raise
        except TrackingError as error:
            raise RejectedError(str(error)) from error

    def _add_metrics(self, event: TrackingEvent, step: int) -> None:
        metrics = [Metric(_legal(key), value, event.time_ms, step) for key, value in event.body["metrics"].items()]
        self._metrics.setdefault(run_name(event.number), []).extend(metrics)

    def _send_metrics(self) -> None:
        for name, metrics in self._metrics.items():
            for part in _parts(metrics, MAX_METRICS):
                self._client.log_batch(self._run_id(name), metrics=part)
        self._metrics = {}

    def _start(self, event: TrackingEvent) -> None:
        """The experiment's primary metric, view and description; the parent run's parameters and tags."""
        body = event.body
        run_id = self._run_id(STUDY, event.time_ms)
        larger_is_better = body["direction"] == "maximize"
        self._set_experiment_tag(f"{PRIMARY_METRIC}.name", body["primary_metric"])
        self._set_experiment_tag(f"{PRIMARY_METRIC}.greaterIsBetter", str(larger_is_better).lower())
        self._view = self._view or view(body["primary_metric"], larger_is_better)
        note = f"Trials of the study {self._study}: [best first](#{view_path(self._experiment)})."
        self._set_experiment_tag("mlflow.note.content", note)
        self._describe(STUDY, body["params"], body["tags"])
        self._client.update_run(run_id, status="RUNNING")

    def _set_experiment_tag(self, key: str, value: str) -> None:
        self._client.set_experiment_tag(self._experiment, key, value)

    def _trial(self, event: TrackingEvent) -> None:
        """The trial's run, its parameters, and a column of the view for each of them."""
        name = run_name(event.number)
        run_id = self._run_id(name, event.time_ms)
        self._add_columns(event.body["params"])
        self._describe(name, event.body["params"], {STATE: TrialStatus.RUNNING})
        self._client.update_run(run_id, status="RUNNING")

    def _add_columns(self, params: Iterable[str]) -> None:
        columns = self._view.setdefault("selectedColumns", [])
        new = [column for column in (f"params.`{_legal(name)}`" for name in params) if column not in columns]
        if new:
            columns.extend(new)
            self._set_experiment_tag(VIEW_TAG, json.dumps(self._view))

    def _epoch(self, event: TrackingEvent) -> None:
        """A point of each of the epoch's metrics."""
        self._add_metrics(event, int(event.body["epoch"]))

    def _end(self, event: TrackingEvent) -> None:
        """The trial's state, reason, sums and status."""
        name, state = run_name(event.number), event.body["state"]
        self._describe(name, {}, {STATE: state, REASON: event.body["reason"] or "", **event.body.get("tags", {})})
        self._add_metrics(event, int(event.body["step"]))
        self._send_metrics()
        self._client.set_terminated(self._run_id(name), STATUS[state], event.time_ms)

    def _artifact(self, event: TrackingEvent) -> None:
        """A file or a folder's files among the run's artifacts."""
        path, run_id = readable(Path(event.body["path"])), self._run_id(run_name(event.number))
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(run_id, str(path), event.body["artifact_path"] or None)

    def _encoder(self, event: TrackingEvent) -> None:
        """A logged model of the trial's run."""
        self._registry.log_encoder(event, self._run_id(run_name(event.number)))

    def _champion(self, event: TrackingEvent) -> None:
        """A registered version of the trial's logged model, and the tags that name the champion."""
        name = run_name(event.number)
        self._registry.register(event, self._run_id(name))
        for run in self._find_runs(f"tags.`{CHAMPION}` = 'yes'"):
            if run.data.tags[RUN] != name and run.info.lifecycle_stage != "deleted":
                self._client.delete_tag(run.info.run_id, CHAMPION)
        self._describe(name, {}, {CHAMPION: "yes"})
        self._describe(STUDY, {}, {CHAMPION: name})

    def _finish(self, event: TrackingEvent) -> None:
        """The summary and status of the parent run."""
        run_id = self._run_id(STUDY)
        self._add_metrics(event, int(event.body["step"]))
        self._send_metrics()
        self._client.set_terminated(run_id, "FINISHED", event.time_ms)
        self._load_runs()

    def _describe(self, name: str, params: dict[str, object], tags: dict[str, str]) -> None:
        """Add parameters (MLflow never changes one: the first value stays) and set tags; long values become artifacts."""
        run_id = self._run_id(name)
        known = self._client.get_run(run_id).data.params if params else {}
        new = {_legal(key): str(value) for key, value in params.items() if _legal(key) not in known}
        for part in _parts([Param(key, _shorten(value)) for key, value in new.items()], MAX_PARAMS):
            self._client.log_batch(run_id, params=part)
        self._client.log_batch(run_id, tags=[RunTag(key, _shorten(value)) for key, value in tags.items()])
        long = {key: value for key, value in (new | tags).items() if len(value) > MAX_VALUE}
        for key, value in long.items():
            self._client.log_text(run_id, json.dumps({key: value}, indent=2), f"long_values/{key}.json")

    def _run_id(self, name: str, start_ms: int | None = None) -> str:
        """The id of a run, which is created if it does not exist."""
        if name not in self._runs:
            found = self._find_runs(f"tags.`{RUN}` = '{name}'")
            self._runs[name] = self._merge(found) if found else self._create(name, start_ms)
        info = self._runs[name].info
        if info.lifecycle_stage == "deleted":
            command = f"`mlflow runs restore --run-id {info.run_id}`, {self._environment}"
            raise RejectedError(f"its run is deleted: restore it with {command}")
        return str(info.run_id)

    def _create(self, name: str, start_ms: int | None) -> Any:
        tags = {STUDY_ID: self._study_id, RUN: name}
        if name != STUDY:
            tags["mlflow.parentRunId"] = self._run_id(STUDY)
        return self._client.create_run(self._experiment, start_ms, tags, self._study if name == STUDY else name)

    def _find_runs(self, condition: str) -> list[Any]:
        search = partial(self._client.search_runs, [self._experiment], condition, ViewType.ALL, 200)
        return list(all_pages(search))

    def _merge(self, runs: list[Any]) -> Any:
        """Keep one of several runs of a trial: a server that hung may process a request that was repeated meanwhile."""
        alive = [run for run in runs if run.info.lifecycle_stage != "deleted"]
        best, *duplicates = sorted(
            alive or runs, key=lambda run: (-len(run.data.params) - len(run.data.metrics), run.info.run_id)
        )
        for duplicate in duplicates if alive else ():
            self._client.delete_run(duplicate.info.run_id)
        return best

    def _load_runs(self) -> None:
        groups: dict[str, list[Any]] = {}
        for run in self._find_runs(f"tags.`{STUDY_ID}` = '{self._study_id}'"):
            groups.setdefault(run.data.tags[RUN], []).append(run)
        self._runs = {name: self._merge(runs) for name, runs in groups.items()}


def _legal(name: str) -> str:
    """Replace the characters that MLflow forbids in names, such as ``@``."""
    return re.sub(r"[^\w/. :-]", "_", name)[:250]


def _shorten(value: str) -> str:
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - 3] + "..."


def _parts(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
