"""MLflow's model registry: encoders as logged models, the champions as versions of one registered model."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from csmae.scratch import scratch
from csmae.tracking.model_card import UNKNOWN, format_bands, model_card, read_settings
from csmae.tracking.outbox import TrackingError, TrackingEvent

log = logging.getLogger(__name__)

MODEL, ALIAS = "csmae-encoder", "champion"
WEIGHTS, SETTINGS = "encoder.safetensors", "config.json"
CHECKSUM, STUDY, TRIAL, DATA = "csmae.sha256", "csmae.study", "csmae.trial", "csmae.data"
METRIC, SCORE, DIRECTION, BANDS = "csmae.primary_metric", "csmae.score", "csmae.direction", "csmae.bands"
SYNTHETIC = "synthetic"
"""How the tag ``DATA`` of synthetic scenes begins."""


def checksum(encoder_dir: Path) -> str:
    """SHA-256 of the weights and then the settings of an encoder's folder.

    Raises:
        TrackingError: One of the two files cannot be read.
    """
    digest = hashlib.sha256()
    for name in (WEIGHTS, SETTINGS):
        try:
            with (encoder_dir / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise TrackingError(
                f"{encoder_dir}: no encoder: {name} cannot be read: {error.strerror}: restore the file, or name another encoder"
            ) from None
    return digest.hexdigest()


def study_alias(study: str) -> str:
    """The alias of a study's champion.

    MLflow allows letters, digits, ``-`` and ``_``. If other characters are replaced, a part of a hash follows, so that
    studies with different names have different aliases.
    """
    legal = re.sub(r"[^a-zA-Z0-9_-]", "-", study)
    suffix = "" if legal == study else f"-{hashlib.sha256(study.encode()).hexdigest()[:6]}"
    return f"{ALIAS}-{legal}{suffix}"


def all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of all pages of a search in MLflow."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


class Registry:
    """Logged models of one study's experiment, and the registered model that all studies share.

    Args:
        client: An MLflow client.
        experiment: The experiment's id.
        study: Its name.
    """

    def __init__(self, client: Any, experiment: str, study: str) -> None:
        self._client, self._experiment, self._study = client, experiment, study

    def log_encoder(self, event: TrackingEvent, run_id: str) -> Any:
        """Create a logged model of a run with an encoder's files, card and metrics; a repeated call changes nothing.

        Returns:
            The logged model.
        """
        body = event.body
        model, unfinished = self._find(run_id, body["sha256"])
        for other in unfinished:
            self._client.delete_logged_model(other.model_id)
        if model and str(model.status) == "READY":
            return self._add_metrics(model, event, run_id)
        folder = Path(body["encoder_dir"])
        if checksum(folder) != body["sha256"]:
            raise TrackingError(f"{folder}: has changed since the search reported it")
        model = model or self._client.create_logged_model(
            self._experiment, MODEL, run_id, self._model_tags(event, folder), model_type=MODEL
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._log_card(model, event)
        for key, value in body["metrics"].items():
            self._client.log_metric(run_id, key, value, body["step_ms"], body["step"], model_id=model.model_id)
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _add_metrics(self, model: Any, event: TrackingEvent, run_id: str) -> Any:
        """Add new metrics and show them in the card, such as those of a good trial that has become the champion."""
        known = {(metric.key, repr(metric.value)) for metric in model.metrics or ()}  # NaN equals nothing
        new = {key: value for key, value in event.body["metrics"].items() if (key, repr(value)) not in known}
        if new:
            self._log_card(model, event)
        for key, value in new.items():
            self._client.log_metric(run_id, key, value, event.time_ms, event.body["step"], model_id=model.model_id)
        return model

    def _find(self, run_id: str, sha256: str) -> tuple[Any, list[Any]]:
        """The logged model of a run for these files, complete or not, and other incomplete ones of failed uploads."""
        search = partial(self._client.search_logged_models, [self._experiment], f"source_run_id = '{run_id}'")
        logged = sorted(all_pages(search), key=lambda model: str(model.status) != "READY")
        found = next((model for model in logged if model.tags.get(CHECKSUM) == sha256), None)
        return found, [model for model in logged if str(model.status) != "READY" and model is not found]

    def _model_tags(self, event: TrackingEvent, folder: Path) -> dict[str, str]:
        own = {STUDY: self._study, TRIAL: str(event.number), CHECKSUM: event.body["sha256"]}
        return {**event.body["tags"], **own, BANDS: format_bands(read_settings(folder))}

    def _log_card(self, model: Any, event: TrackingEvent) -> None:
        with scratch("card") as draft:
            (draft / "README.md").write_text(self._card(model, event), encoding="utf-8")
            self._client.log_model_artifacts(model.model_id, str(draft))

    def _card(self, model: Any, event: TrackingEvent) -> str:
        body = event.body
        origin = {"study": self._study, "trial": str(event.number), "sha256": body["sha256"]}
        origin["data"] = body["tags"].get(DATA, UNKNOWN)
        return model_card(
            f"{MODEL}: study {self._study}, trial {event.number}",
            read_settings(Path(body["encoder_dir"])),
            origin,
            body["metrics"],
            f"models:/{model.model_id}",
        )

    def register(self, event: TrackingEvent, run_id: str) -> None:
        """Register the encoder of a study's champion and move the aliases.

        ``champion-STUDY`` moves to it unconditionally: the search decides which trial is the best. ``champion`` names the
        best of the studies' champions on the data last searched; an encoder trained on synthetic scenes never takes it from
        one trained on real ones.
        """
        version = self._register_version(event, run_id)
        self._client.set_registered_model_alias(MODEL, study_alias(self._study), version.version)
        aliases = self._client.get_registered_model(MODEL).aliases
        if ALIAS in aliases:
            holder = self._client.get_model_version(MODEL, aliases[ALIAS])
            if holder.tags.get(STUDY) == self._study:
                version = self._best(aliases, version)
            elif reason := _reason_to_keep(holder.tags, version.tags):
                text = "models:/%s@%s stays with version %s of study %s: %s"
                log.warning(text, MODEL, ALIAS, holder.version, holder.tags.get(STUDY), reason)
                return
        self._client.set_registered_model_alias(MODEL, ALIAS, version.version)

    def _best(self, aliases: Mapping[str, str], version: Any) -> Any:
        """The best of the studies' champions that compare with a version: the study may have named a worse champion."""
        for alias, number in aliases.items():
            if not alias.startswith(f"{ALIAS}-"):
                continue
            rival = self._client.get_model_version(MODEL, number)
            if rival.tags.get(STUDY) == self._study:
                continue  # the version itself, or a former champion that a user gave an alias
            comparable = all(rival.tags.get(name) == version.tags.get(name) for name in (METRIC, DATA, BANDS))
            if comparable and _reason_to_keep(version.tags, rival.tags) is None:
                version = rival
        return version

    def _register_version(self, event: TrackingEvent, run_id: str) -> Any:
        """The version of the registered model for a logged model, created if it does not exist."""
        from mlflow.exceptions import MlflowException

        model = self.log_encoder(event, run_id)
        try:
            self._client.create_registered_model(MODEL, description="CSMAE encoders, the best of each study.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"name = '{MODEL}'")
        same = [version for version in versions if version.source == model.artifact_location]
        same.sort(key=lambda version: int(version.version))
        for duplicate in same[1:]:
            self._client.delete_model_version(MODEL, duplicate.version)
        tags, card = self._version_tags(event, model), self._card(model, event)
        if same:
            return self._update_version(same[0], tags, card)
        source = model.artifact_location  # `models:/ID` would be looked up on the default server
        return self._client.create_model_version(
            MODEL, source, run_id, tags, description=card, await_creation_for=0, model_id=model.model_id
        )

    def _version_tags(self, event: TrackingEvent, model: Any) -> dict[str, str]:
        body, metric = event.body, event.body["primary_metric"]
        score = body["score"] if "score" in body else body["metrics"][metric]
        tags = {**model.tags, **body["tags"], METRIC: metric, SCORE: repr(score), DIRECTION: body["direction"]}
        return {key: value for key, value in tags.items() if key.startswith("csmae.")}

    def _update_version(self, version: Any, tags: Mapping[str, str], card: str) -> Any:
        """Set what has changed of a version, such as its score after further seeds."""
        for key, value in tags.items():
            if version.tags.get(key) != value:
                self._client.set_model_version_tag(MODEL, version.version, key, value)
        if version.description != card:
            self._client.update_model_version(MODEL, version.version, description=card)
        return self._client.get_model_version(MODEL, version.version)


def _reason_to_keep(holder: dict[str, str], new: dict[str, str]) -> str | None:
    """Why the alias stays with its holder; None if it moves. Scores compare only on the same metric and data."""
    if holder.get(BANDS) != new.get(BANDS):
        return f"it reads other bands ({holder.get(BANDS)})"
    if holder.get(METRIC) != new.get(METRIC) or holder.get(DATA) != new.get(DATA):
        return "the new one has seen synthetic scenes only" if new.get(DATA, "").startswith(SYNTHETIC) else None
    gain = float(new[SCORE]) - float(holder[SCORE])
    if (-gain if new[DIRECTION] == "minimize" else gain) > 0:
        return None
    return f"its {new[METRIC]} is {float(holder[SCORE]):.4f}, the new one's {float(new[SCORE]):.4f}"
