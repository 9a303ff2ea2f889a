"""Weights & Biases as a sink: one group a study, one run a trial. Offline it keeps its runs in the study's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import wandb

from csmae.tracking.outbox import HEADER, KINDS, Event
from csmae.tracking.registry import study_alias
from csmae.tracking.uploader import RefusedError, readable

MODEL = "csmae-encoder"


class WandbSink:
    """Stores a study's events in a project of Weights & Biases.

    A run keeps to one id however often it is opened, and takes no step twice: an event sent again changes nothing.

    Args:
        project: Made where there is none; ``entity/project`` for another's.
        folder: Of the study.
        study_id: Tells this study's runs from those of another of the same name.
    """

    is_new = False

    def __init__(self, project: str, folder: Path, study_id: str) -> None:
        self._entity, _, self._project = project.rpartition("/")
        self._folder, self._study_id = folder, study_id
        self._open: dict[str, Any] = {}
        self._exit_codes: dict[str, int] = {}
        self.page = quote(f"/{project}/groups/{folder.name}")

    def send(self, events: Sequence[Event]) -> None:
        """Store events; a run is closed once its trial has ended, and again after a picture that comes late."""
        for event in events:
            if event.kind == HEADER:
                continue
            if event.kind not in KINDS:
                raise RefusedError(f"this version knows no event of kind {event.kind!r}")
            self._send(replace(event, body=_Body(event.body)))

    def _send(self, event: Event) -> None:
        name = _run_name(event.number)
        if event.kind in ("start", "trial"):
            self._exit_codes.pop(name, None)
        getattr(self, f"_{event.kind}")(event)
        if name in self._exit_codes and name in self._open:
            self._open.pop(name).finish(exit_code=self._exit_codes[name])

    def _run(self, number: int | None) -> Any:
        """A trial's run, or the study's, opened where it is not."""
        name = _run_name(number)
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

    def _start(self, event: Event) -> None:
        self._run(event.number).config.update({**event.body["params"], **event.body["tags"]}, allow_val_change=True)

    def _trial(self, event: Event) -> None:
        self._run(event.number).config.update(event.body["params"], allow_val_change=True)

    def _epoch(self, event: Event) -> None:
        self._run(event.number).log(event.body["metrics"], step=int(event.body["epoch"]))

    def _end(self, event: Event) -> None:
        body = event.body
        facts = {"state": body["state"], "reason": body["reason"], **body.get("tags", {})}
        self._run(event.number).summary.update(facts | body["metrics"])
        self._exit_codes[_run_name(event.number)] = int(event.body["state"] == "FAIL")

    def _artifact(self, event: Event) -> None:
        path = readable(Path(event.body["path"]))
        files = [path] if path.is_file() else sorted(path.rglob("*.png"))
        pictures = {f"{event.body['artifact_path']}/{file.stem}": str(file) for file in files if file.suffix == ".png"}
        run = self._run(event.number)
        run.summary.update({name: wandb.Image(file) for name, file in pictures.items()})
        if path.suffix == ".html":
            run.summary.update({path.stem: wandb.Html(path.read_text(encoding="utf-8"))})

    def _encoder(self, event: Event, aliases: Sequence[str] = ()) -> None:
        body = event.body
        details = {**body["tags"], **body["metrics"], "trial": event.number, "csmae.sha256": body["sha256"]}
        files = wandb.Artifact(MODEL, "model", metadata=details)
        files.add_dir(str(readable(Path(body["encoder_dir"]))))
        self._run(event.number).log_artifact(files, aliases=list(aliases))

    def _champion(self, event: Event) -> None:
        self._encoder(event, ("champion", study_alias(self._folder.name)))
        self._run(None).summary.update({"champion": _run_name(event.number)})

    def _finish(self, event: Event) -> None:
        self._run(event.number).summary.update(event.body["metrics"])
        self._exit_codes[_run_name(None)] = 0


class _Body(dict[str, Any]):
    """An event's body. One that another version of this program wrote may lack a part."""

    def __missing__(self, name: str) -> Any:
        raise RefusedError(f"the event has no {name!r}")


def _run_name(number: int | None) -> str:
    return "study" if number is None else f"trial {number}"
