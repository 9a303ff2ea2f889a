"""Weights & Biases as a sink: one group per study, one run per trial. Offline it keeps its runs in the study's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from csmae.tracking.outbox import TrackingEvent
from csmae.tracking.registry import ALIAS, MODEL, study_alias
from csmae.tracking.sink import dispatch, readable, run_name
from csmae.trial_status import TrialStatus


class WandbSink:
    """Stores a study's events in a project of Weights & Biases.

    A run keeps its id however often it is opened, and accepts no step twice, so sending an event again changes nothing.

    Args:
        project: Created if it does not exist; ``entity/project`` for one of another entity.
        folder: The study's.
        study_id: Distinguishes this study's runs from those of another study of the same name.
    """

    is_new = False

    def __init__(self, project: str, folder: Path, study_id: str) -> None:
        self._entity, _, self._project = project.rpartition("/")
        self._folder, self._study_id = folder, study_id
        self._open: dict[str, Any] = {}
        self._exit_codes: dict[str, int] = {}
        """By run, the exit codes of trials that have ended."""

    def send(self, events: Sequence[TrackingEvent]) -> None:
        """Store events. A run is closed when its trial has ended, and again after a late artifact."""
        for event in events:
            name = run_name(event.number)
            if event.kind in ("start", "trial"):
                self._exit_codes.pop(name, None)
            dispatch(self, event)
            if name in self._exit_codes and name in self._open:
                self._open.pop(name).finish(exit_code=self._exit_codes[name])

    def _run(self, number: int | None) -> Any:
        """The run of a trial, or of the study, opened if it is not."""
        name = run_name(number)
        if name not in self._open:
            self._open[name] = wandb.init(
                entity=self._entity or None,
                project=self._project,
                dir=self._folder,
                id=f"{self._study_id[:12]}-{name.replace(' ', '-')}",
                name=self._folder.name if number is None else name,
                group=self._folder.name,
                job_type=name.partition(" ")[0],
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        return self._open[name]

    def _start(self, event: TrackingEvent) -> None:
        self._run(event.number).config.update({**event.body["params"], **event.body["tags"]}, allow_val_change=True)

    def _trial(self, event: TrackingEvent) -> None:
        self._run(event.number).config.update(event.body["params"], allow_val_change=True)

    def _epoch(self, event: TrackingEvent) -> None:
        self._run(event.number).log(event.body["metrics"], step=int(event.body["epoch"]))

    def _end(self, event: TrackingEvent) -> None:
        body = event.body
        summary = {"state": body["state"], "reason": body["reason"], **body.get("tags", {}), **body["metrics"]}
        self._run(event.number).summary.update(summary)
        self._exit_codes[run_name(event.number)] = int(body["state"] == TrialStatus.FAIL)

    def _artifact(self, event: TrackingEvent) -> None:
        path = readable(Path(event.body["path"]))
        files = [path] if path.is_file() else sorted(path.rglob("*.png"))
        images = {f"{event.body['artifact_path']}/{file.stem}": str(file) for file in files if file.suffix == ".png"}
        run = self._run(event.number)
        run.summary.update({name: wandb.Image(file) for name, file in images.items()})
        if path.suffix == ".html":
            run.summary.update({path.stem: wandb.Html(path.read_text(encoding="utf-8"))})

    def _encoder(self, event: TrackingEvent, aliases: Sequence[str] = ()) -> None:
        body = event.body
        metadata = {**body["tags"], **body["metrics"], "trial": event.number, "csmae.sha256": body["sha256"]}
        artifact = wandb.Artifact(MODEL, "model", metadata=metadata)
        artifact.add_dir(str(readable(Path(body["encoder_dir"]))))
        self._run(event.number).log_artifact(artifact, aliases=list(aliases))

    def _champion(self, event: TrackingEvent) -> None:
        self._encoder(event, (ALIAS, study_alias(self._folder.name)))
        self._run(None).summary.update({"champion": run_name(event.number)})

    def _finish(self, event: TrackingEvent) -> None:
        self._run(event.number).summary.update(event.body["metrics"])
        self._exit_codes[run_name(None)] = 0
