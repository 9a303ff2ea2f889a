"""MLflow as a sink: one experiment and parent run a study, one child run a trial, each found again by its tag."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from csmae.tracking.mlflow_database import STUDY_ID, artifact_location, client_of, follow
from csmae.tracking.mlflow_settings import quiet_mlflow
from csmae.tracking.outbox import HEADER, KINDS, Event, TrackingError
from csmae.tracking.registry import Registry
from csmae.tracking.tracker import shown
from csmae.tracking.uploader import RefusedError, readable

quiet_mlflow()

from mlflow.entities import Metric, Param, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.utils.credentials import get_default_host_creds  # noqa: E402
from mlflow.utils.rest_utils import http_request  # noqa: E402

RUN, STATE, REASON = "csmae.run", "csmae.state", "csmae.reason"
CHAMPION = "csmae.champion"
"""Tag of the champion's run, and of the study's, which names it."""
PRIMARY_METRIC = "mlflow.experiment.primaryMetric"
VIEW_TAG = "mlflow.sharedViewState.trials"
STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED", "RUNNING": "KILLED"}
"""MLflow's status of a trial's state; RUNNING is a trial that the search left in the middle."""
MAX_VALUE = 6000
"""Characters of a parameter or tag; MLflow takes 6,000 and 8,000."""
MAX_METRICS, MAX_PARAMS = 1000, 100
"""Of one call."""

OLDEST_SERVER = (3, 11)
"""Servers before it let strangers in: CVE-2026-2614, CVE-2026-2652, CVE-2026-0545."""

Item = TypeVar("Item")


def check_server(uri: str) -> None:
    """Refuse a tracking server that is known to be unsafe; one that does not tell its version is taken.

    Raises:
        MlflowException: It is too old, or does not answer.
    """
    if not uri.startswith("http"):
        return
    said = http_request(get_default_host_creds(uri), "/version", "GET").text
    found = re.match(r"(\d+)\.(\d+)\.\d+", said)
    if found and tuple(map(int, found.groups())) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise MlflowException(f"runs MLflow {found[0]}, which has known security holes: update it to {oldest} or later")


def ask(uri: str) -> None:
    """Ask a place for its first experiment, to see whether it answers.

    Raises:
        Exception: It does not, or not well.
    """
    check_server(uri)
    client_of(uri).search_experiments(max_results=1)


def view(metric: str, larger: bool) -> dict[str, Any]:
    """MLflow's state of a table of runs: best first, the metric beside the explored parameters.

    Its page has no other way to be opened like this: the experiment's primary metric only chooses the charts.
    """
    column = f"metrics.`{metric}`"
    chosen = {"orderByKey": column, "orderByAsc": not larger, "selectedColumns": ["attributes.`Models`", column]}
    every = {"searchFilter": "", "startTime": "ALL", "lifecycleFilter": "Active"}
    return {**every, "modelVersionFilter": "All Runs", "datasetsFilter": [], **chosen}


def view_path(experiment: str) -> str:
    """The table's page on an MLflow server, behind its address and ``/#``."""
    return f"/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=trials"


class MlflowSink:
    """Stores a study's events in MLflow.

    Args:
        uri: Tracking server or database.
        study: Name of the experiment and of the parent run.
        study_id: Tells this study from another of the same name.

    Raises:
        MlflowException: The server does not answer, or its experiment is deleted or another study's.
    """

    def __init__(self, uri: str, study: str, study_id: str) -> None:
        self._study, self._study_id = study, study_id
        self._environment = f"MLFLOW_TRACKING_URI={shlex.quote(shown(uri))}"
        check_server(uri)
        self._client = client_of(uri)
        self._runs: dict[str, Any] = {}
        self._view: dict[str, Any] = {}
        self.is_new = not self._find_experiment()
        follow(uri, study)
        if self.is_new:
            tags = {STUDY_ID: study_id, "mlflow.experimentKind": "custom_model_development"}
            self._experiment = str(self._client.create_experiment(study, artifact_location(uri, study), tags))
        self.page = view_path(self._experiment)
        self._registry = Registry(self._client, self._experiment, study)
        self._settle()

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

    def send(self, events: Sequence[Event]) -> None:
        """Store events; those already stored change nothing."""
        metrics: dict[str, list[Metric]] = {}
        try:
            for event in events:
                if event.kind == "epoch":
                    metrics.setdefault(_run_name(event), []).extend(_metrics(event, int(event.body["epoch"])))
                elif event.kind in KINDS:
                    self._send_metrics(metrics)
                    getattr(self, f"_{event.kind}")(event)
                elif event.kind != HEADER:
                    raise RefusedError(f"this version knows no event of kind {event.kind!r}")
            self._send_metrics(metrics)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise RefusedError(_one_line(error)) from error
            raise
        except TrackingError as error:
            raise RefusedError(str(error)) from error
        except KeyError as error:  # written by another version of this program
            raise RefusedError(f"the event has no {error}") from error

    def _send_metrics(self, metrics: dict[str, list[Metric]]) -> None:
        for name, values in metrics.items():
            for part in _parts(values, MAX_METRICS):
                self._client.log_batch(self._run_id(name), metrics=part)
        metrics.clear()

    def _start(self, event: Event) -> None:
        body = event.body
        run_id = self._run_id("study", event.time_ms)
        self._client.set_experiment_tag(self._experiment, f"{PRIMARY_METRIC}.name", body["primary_metric"])
        larger = body["direction"] == "maximize"
        self._client.set_experiment_tag(self._experiment, f"{PRIMARY_METRIC}.greaterIsBetter", str(larger).lower())
        self._view = self._view or view(body["primary_metric"], larger)
        note = f"Trials of the study {self._study}: [best first](#{view_path(self._experiment)})."
        self._client.set_experiment_tag(self._experiment, "mlflow.note.content", note)
        self._describe("study", body["params"], body["tags"])
        self._client.update_run(run_id, status="RUNNING")

    def _trial(self, event: Event) -> None:
        name = _run_name(event)
        run_id = self._run_id(name, event.time_ms)
        self._show_columns(event.body["params"])
        self._describe(name, event.body["params"], {STATE: "RUNNING"})
        self._client.update_run(run_id, status="RUNNING")

    def _show_columns(self, params: Iterable[str]) -> None:
        columns = self._view.setdefault("selectedColumns", [])
        new = [column for column in (f"params.`{_clean(name)}`" for name in params) if column not in columns]
        if new:
            columns.extend(new)
            self._client.set_experiment_tag(self._experiment, VIEW_TAG, json.dumps(self._view))

    def _end(self, event: Event) -> None:
        name, state = _run_name(event), event.body["state"]
        self._describe(name, {}, {STATE: state, REASON: event.body["reason"] or "", **event.body.get("tags", {})})
        self._send_metrics({name: _metrics(event, int(event.body["step"]))})
        self._client.set_terminated(self._run_id(name), STATUS[state], event.time_ms)

    def _artifact(self, event: Event) -> None:
        path, run_id = readable(Path(event.body["path"])), self._run_id(_run_name(event))
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(run_id, str(path), event.body["artifact_path"] or None)

    def _encoder(self, event: Event) -> None:
        self._registry.log_encoder(event, self._run_id(_run_name(event)))

    def _champion(self, event: Event) -> None:
        name = _run_name(event)
        self._registry.register(event, self._run_id(name))
        for run in self._find_runs(f"tags.`{CHAMPION}` = 'yes'"):
            if run.data.tags[RUN] != name and run.info.lifecycle_stage != "deleted":
                self._client.delete_tag(run.info.run_id, CHAMPION)
        self._describe(name, {}, {CHAMPION: "yes"})
        self._describe("study", {}, {CHAMPION: name})

    def _finish(self, event: Event) -> None:
        run_id = self._run_id("study")
        self._send_metrics({"study": _metrics(event, int(event.body["step"]))})
        self._client.set_terminated(run_id, "FINISHED", event.time_ms)
        self._settle()

    def _describe(self, name: str, params: dict[str, object], tags: dict[str, str]) -> None:
        """Add parameters (which MLflow never changes: the first value stays) and set tags."""
        run_id = self._run_id(name)
        known = self._client.get_run(run_id).data.params if params else {}
        new = {_clean(key): str(value) for key, value in params.items() if _clean(key) not in known}
        for part in _parts([Param(key, _shorten(value)) for key, value in new.items()], MAX_PARAMS):
            self._client.log_batch(run_id, params=part)
        self._client.log_batch(run_id, tags=[RunTag(key, _shorten(value)) for key, value in tags.items()])
        long = {key: value for key, value in (new | tags).items() if len(value) > MAX_VALUE}
        for key, value in long.items():
            self._client.log_text(run_id, json.dumps({key: value}, indent=2), f"long_values/{key}.json")

    def _run_id(self, name: str, start_ms: int | None = None) -> str:
        return str(self._run(name, start_ms).info.run_id)

    def _run(self, name: str, start_ms: int | None = None) -> Any:
        """The run of that name, made where there is none."""
        if name not in self._runs:
            found = self._find_runs(f"tags.`{RUN}` = '{name}'")
            self._runs[name] = self._choose(found) if found else self._create(name, start_ms)
        run = self._runs[name]
        if run.info.lifecycle_stage == "deleted":
            command = f"`mlflow runs restore --run-id {run.info.run_id}`, {self._environment}"
            raise RefusedError(f"its run is deleted: restore it with {command}")
        return run

    def _create(self, name: str, start_ms: int | None) -> Any:
        tags = {STUDY_ID: self._study_id, RUN: name}
        if name != "study":
            tags["mlflow.parentRunId"] = self._run_id("study")
        title = self._study if name == "study" else name
        return self._client.create_run(self._experiment, start_ms, tags, title)

    def _find_runs(self, condition: str) -> list[Any]:
        token, runs = None, []
        while True:
            page = self._client.search_runs([self._experiment], condition, ViewType.ALL, 200, page_token=token)
            runs.extend(page)
            token = page.token
            if not token:
                return runs

    def _choose(self, runs: list[Any]) -> Any:
        """One run of several with one name: a server that hung may carry out a request that was repeated since."""
        alive = [run for run in runs if run.info.lifecycle_stage != "deleted"]
        best, *ghosts = sorted(
            alive or runs, key=lambda run: (-len(run.data.params) - len(run.data.metrics), run.info.run_id)
        )
        for ghost in ghosts if alive else ():
            self._client.delete_run(ghost.info.run_id)
        return best

    def _settle(self) -> None:
        groups: dict[str, list[Any]] = {}
        for run in self._find_runs(f"tags.`{STUDY_ID}` = '{self._study_id}'"):
            groups.setdefault(run.data.tags[RUN], []).append(run)
        self._runs = {name: self._choose(runs) for name, runs in groups.items()}


def _run_name(event: Event) -> str:
    return "study" if event.number is None else f"trial {event.number}"


def _metrics(event: Event, step: int) -> list[Metric]:
    return [Metric(_clean(key), value, event.time_ms, step) for key, value in event.body["metrics"].items()]


def _clean(name: str) -> str:
    """A name that MLflow takes: it forbids some characters, ``@`` among them."""
    return re.sub(r"[^\w/. :-]", "_", name)[:250]


def _shorten(value: str) -> str:
    return value if len(value) <= MAX_VALUE else value[: MAX_VALUE - 3] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _parts(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
