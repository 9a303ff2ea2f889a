"""The registry: encoders as logged models, the best ones registered."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csmae.scratch import scratch
from csmae.tracking.model_card import bands_of, model_card, read_settings
from csmae.tracking.outbox import Event, TrackingError

log = logging.getLogger(__name__)

MODEL, ALIAS = "csmae-encoder", "champion"
WEIGHTS, SETTINGS = "encoder.safetensors", "config.json"
CHECKSUM, STUDY, TRIAL, DATA = "csmae.sha256", "csmae.study", "csmae.trial", "csmae.data"
METRIC, SCORE, DIRECTION, BANDS = "csmae.primary_metric", "csmae.score", "csmae.direction", "csmae.bands"
SYNTHETIC = "synthetic"


def checksum(encoder_dir: Path) -> str:
    """SHA-256 over the weights and then the settings of an encoder folder.

    Raises:
        TrackingError: One of the two files is missing.
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
    """The alias of a study's best encoder; MLflow takes letters, digits, ``-`` and ``_``.

    Names of studies that differ have aliases that differ: where characters are replaced, some of a hash follow.
    """
    cleaned = re.sub(r"[^a-zA-Z0-9_-]", "-", study)
    suffix = "" if cleaned == study else f"-{hashlib.sha256(study.encode()).hexdigest()[:6]}"
    return f"{ALIAS}-{cleaned}{suffix}"


class Registry:
    """Logged models of one study's experiment, and the registered model that all studies share.

    Args:
        client: An MLflow client.
        experiment: The experiment's id.
        study: Its name.
    """

    def __init__(self, client: Any, experiment: str, study: str) -> None:
        self._client, self._experiment, self._study = client, experiment, study

    def log_encoder(self, event: Event, run_id: str) -> Any:
        """Keep an encoder's files, card and metrics with its run; a second time changes nothing.

        Returns:
            The logged model.
        """
        body = event.body
        model, ghosts = self._choose(run_id, body["sha256"])
        for ghost in ghosts:
            self._client.delete_logged_model(ghost.model_id)
        if model and str(model.status) == "READY":
            return self._complete(model, event, run_id)
        folder = Path(body["encoder_dir"])
        if checksum(folder) != body["sha256"]:
            raise TrackingError(f"{folder}: has changed since the search handed it in")
        model = model or self._client.create_logged_model(
            self._experiment, MODEL, run_id, self._tags(event, folder), model_type=MODEL
        )
        self._client.log_model_artifacts(model.model_id, str(folder))
        self._log_card(model, event)
        for key, value in body["metrics"].items():
            self._client.log_metric(run_id, key, value, body["step_ms"], body["step"], model_id=model.model_id)
        return self._client.finalize_logged_model(model.model_id, "READY")

    def _complete(self, model: Any, event: Event, run_id: str) -> Any:
        """Add metrics that came later, as of a good trial that has become the champion; the card shows them, too."""
        known = {(metric.key, repr(metric.value)) for metric in model.metrics or ()}  # NaN equals nothing
        new = {key: value for key, value in event.body["metrics"].items() if (key, repr(value)) not in known}
        if new:
            self._log_card(model, event)
        for key, value in new.items():
            self._client.log_metric(run_id, key, value, event.time_ms, event.body["step"], model_id=model.model_id)
        return model

    def _log_card(self, model: Any, event: Event) -> None:
        with scratch("card") as draft:
            (draft / "README.md").write_text(self._card(model, event), encoding="utf-8")
            self._client.log_model_artifacts(model.model_id, str(draft))

    def _choose(self, run_id: str, sha256: str) -> tuple[Any, list[Any]]:
        """The logged model of a run that has these files, or was to get them, and those of other attempts that broke off."""
        logged = sorted(self._logged(run_id), key=lambda model: str(model.status) != "READY")
        chosen = next((model for model in logged if model.tags.get(CHECKSUM) == sha256), None)
        return chosen, [model for model in logged if str(model.status) != "READY" and model is not chosen]

    def _logged(self, run_id: str) -> Iterator[Any]:
        """Logged models of a run."""
        token = None
        while True:
            page = self._client.search_logged_models(
                [self._experiment], f"source_run_id = '{run_id}'", page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _tags(self, event: Event, folder: Path) -> dict[str, str]:
        own = {STUDY: self._study, TRIAL: str(event.number), CHECKSUM: event.body["sha256"]}
        return {**event.body["tags"], **own, BANDS: bands_of(read_settings(folder))}

    def _card(self, model: Any, event: Event) -> str:
        body = event.body
        facts = {"study": self._study, "trial": str(event.number), "sha256": body["sha256"]}
        facts["data"] = body["tags"].get(DATA, "not said")
        return model_card(
            f"{MODEL}: study {self._study}, trial {event.number}",
            read_settings(Path(body["encoder_dir"])),
            facts,
            body["metrics"],
            f"models:/{model.model_id}",
        )

    def register(self, event: Event, run_id: str) -> None:
        """Register the encoder of a study's champion and let the aliases name it.

        ``champion-STUDY`` names it whatever was named before: which trial is the best is the search's decision.
        ``champion`` names the best of the studies' champions on the data last searched; an encoder trained on synthetic
        scenes never takes it from one trained on real ones.
        """
        version = self._version(event, run_id)
        self._client.set_registered_model_alias(MODEL, study_alias(self._study), version.version)
        aliases = self._client.get_registered_model(MODEL).aliases
        if ALIAS in aliases:
            holder = self._client.get_model_version(MODEL, aliases[ALIAS])
            if holder.tags.get(STUDY) == self._study:
                version = self._best(aliases, version)
            elif reason := _why_it_stays(holder.tags, version.tags):
                text = "models:/%s@%s stays with version %s of study %s: %s"
                log.warning(text, MODEL, ALIAS, holder.version, holder.tags.get(STUDY), reason)
                return
        self._client.set_registered_model_alias(MODEL, ALIAS, version.version)

    def _best(self, aliases: Mapping[str, str], version: Any) -> Any:
        """The best of the studies' champions that compare with a version: what held the alias may have got worse."""
        for alias, number in aliases.items():
            rival = self._client.get_model_version(MODEL, number) if alias.startswith(f"{ALIAS}-") else version
            if rival.tags.get(STUDY) == self._study:
                continue  # a former champion, which an alias of release 0.1.0 still names
            same = all(rival.tags.get(name) == version.tags.get(name) for name in (METRIC, DATA, BANDS))
            if same and _why_it_stays(version.tags, rival.tags) is None:
                version = rival
        return version

    def _version(self, event: Event, run_id: str) -> Any:
        model = self.log_encoder(event, run_id)
        with _unless_exists():
            self._client.create_registered_model(MODEL, description="CSMAE encoders, the best of each study.")
        found = self._client.search_model_versions(f"name = '{MODEL}'")
        same = sorted(
            (v for v in found if v.source == model.artifact_location), key=lambda version: int(version.version)
        )
        for ghost in same[1:]:
            self._client.delete_model_version(MODEL, ghost.version)
        tags, card = self._version_tags(event, model), self._card(model, event)
        if same:
            return self._say_anew(same[0], tags, card)
        source = model.artifact_location  # `models:/ID` would ask the default server
        return self._client.create_model_version(
            MODEL, source, run_id, tags, description=card, await_creation_for=0, model_id=model.model_id
        )

    def _version_tags(self, event: Event, model: Any) -> dict[str, str]:
        body, metric = event.body, event.body["primary_metric"]
        score = body.get("score", body["metrics"][metric])
        tags = {**model.tags, **body["tags"], METRIC: metric, SCORE: repr(score), DIRECTION: body["direction"]}
        return {key: value for key, value in tags.items() if key.startswith("csmae.")}

    def _say_anew(self, version: Any, tags: Mapping[str, str], card: str) -> Any:
        """A version with what its study says of it by now, such as the mean over further seeds."""
        for key, value in tags.items():
            if version.tags.get(key) != value:
                self._client.set_model_version_tag(MODEL, version.version, key, value)
        if version.description != card:
            self._client.update_model_version(MODEL, version.version, description=card)
        return self._client.get_model_version(MODEL, version.version)


@contextlib.contextmanager
def _unless_exists() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _why_it_stays(holder: dict[str, str], new: dict[str, str]) -> str | None:
    """The reason for which an alias stays where it is; scores compare only on the same metric and data."""
    if holder.get(BANDS) != new.get(BANDS):
        return f"it reads other bands ({holder.get(BANDS)})"
    if holder.get(METRIC) != new.get(METRIC) or holder.get(DATA) != new.get(DATA):
        return "the new one has seen synthetic scenes only" if new.get(DATA, "").startswith(SYNTHETIC) else None
    gain = float(new[SCORE]) - float(holder[SCORE])
    if (-gain if new[DIRECTION] == "minimize" else gain) > 0:
        return None
    return f"its {new[METRIC]} is {float(holder[SCORE]):.4f}, the new one's {float(new[SCORE]):.4f}"
