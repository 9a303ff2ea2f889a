"""Scores a search's champion by the published protocol, beside the default configuration and an untrained encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from optuna.trial import FrozenTrial

from csmae.atomic import atomic_write
from csmae.cluster.reserved import NoResourcesError, run_reserved
from csmae.cluster.resources import Allocation
from csmae.config import Config, ConfigError
from csmae.scratch import scratch
from csmae.settings import flatten, merge
from csmae.storage.layout import CHECKPOINT
from csmae.storage.manifest import RemoteFolder, RemoteStorage
from csmae.storage.object_store import describe_error, retry
from csmae.trial_status import TrialStatus
from csmae.trials.leaderboard import leaderboard
from csmae.trials.lineage import trained_values
from csmae.trials.store import TrialStore
from csmae.trials.trial import params_of, status_of


@dataclass(frozen=True)
class EncoderToScore:
    """An encoder that is scored by the published protocol."""

    name: str
    config: Config
    trial: FrozenTrial | None
    """None for the untrained encoder."""
    encoder_dir: Path | None
    """None for the untrained encoder."""


def encoders_to_score(trial_store: TrialStore) -> list[EncoderToScore]:
    """List the untrained encoder, the default configuration if it was trained completely, and the champion.

    Returns:
        In this order; empty if the study has no trial that can win and whose encoder exists.
    """
    entries = leaderboard(trial_store.optuna_study).entries
    with_encoder = (entry for entry in entries if trial_store.encoder_dir(entry.trial.number).exists())
    champion = next(with_encoder, None)
    if champion is None:
        return []
    study = trial_store.study
    encoders = [EncoderToScore("untrained encoder", study.resolve({}), None, None)]
    base = study.space.point({})
    complete = (trial for trial in trial_store.explored() if status_of(trial) is TrialStatus.COMPLETE)
    default = next((trial for trial in complete if params_of(trial) == base), None)
    for name, trial in (("default configuration", default), ("champion", champion.trial)):
        if trial is not None and (encoder_dir := trial_store.encoder_dir(trial.number)).exists():
            config = study.resolve(trained_values(trial, params_of(trial)))
            encoders.append(EncoderToScore(name, config, trial, encoder_dir))
    return encoders


def write_configuration(trial_store: TrialStore, trial: FrozenTrial) -> Path:
    """Write the configuration of a trial as ``champion.yaml`` in the study's folder; ``csmae train`` repeats its training."""
    study, path = trial_store.study, trial_store.folder / "champion.yaml"
    values = merge(merge({}, dict(flatten(study.base))), trained_values(trial, params_of(trial)))
    text = f"# Trial {trial.number} of study {study.name}: csmae train repeats its training with this file.\n\n"
    with atomic_write(path) as file:
        file.write(f"{text}{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}".encode())
    return path


def saved_metrics(encoder_dir: Path) -> dict[str, float]:
    """Metrics of the epoch after which an encoder was saved."""
    content = json.loads((encoder_dir / "config.json").read_text(encoding="utf-8"))
    return dict(content["details"]["metrics"])


def score_encoders(
    encoders: list[EncoderToScore], allocation: Allocation, remote: RemoteStorage | None, warn: Callable[[str], object]
) -> list[dict[str, float]]:
    """Score encoders in parallel on Ray's nodes; on CPUs if there are no GPUs any more.

    Args:
        encoders: What to score.
        allocation: Resources of each scoring.
        remote: Object store with the encoders; None if all nodes share their folder.
        warn: Called with a line if the resources are missing.

    Returns:
        For each encoder ``test/f1_mean``, ``test/f1/s1_to_s1`` and so on.

    Raises:
        NoResourcesError: There are no CPUs either.
    """
    calls = [
        (e.config, e.encoder_dir, remote.remote_folder(e.encoder_dir.parent) if remote and e.encoder_dir else None)
        for e in encoders
    ]
    try:
        return run_reserved(_score, calls, allocation.bundle)
    except NoResourcesError as error:
        if not (allocation.gpus_per_worker or allocation.accelerator_type):
            raise
        warn(f"{error}: the encoders are scored on CPUs")
    return run_reserved(_score, [(*call, "cpu") for call in calls], {"CPU": 1.0})


def _score(
    config: Config, encoder_dir: Path | None, remote: RemoteFolder | None, device: str | None = None
) -> dict[str, float]:
    """Score one encoder, in a Ray task."""
    from csmae.training.scoring import final_scores

    if remote is None:
        return final_scores(config, encoder_dir, device)
    with scratch("score") as copy:
        retry(lambda: remote.fetch(copy, remote.manifest(), lambda name: name.startswith("encoder/")))
        return final_scores(config, copy / "encoder", device)


def download_trials(trial_store: TrialStore) -> None:
    """Download the trials' files, without checkpoints, from the object store to the driver's folder.

    Raises:
        ConfigError: The object store does not respond, or another driver took over the storage.
    """
    remote = trial_store.remote
    if remote is None:
        return
    trials_dir = trial_store.run_dir(0).parent
    try:
        retry(remote.claim.check)
        for name in retry(lambda: remote.store.names(trials_dir.relative_to(remote.folder).as_posix())):
            trial_files = remote.remote_folder(trials_dir / name)
            manifest = retry(trial_files.manifest)
            retry(partial(trial_files.fetch, trials_dir / name, manifest, lambda path: path != CHECKPOINT))
    except OSError as error:
        raise ConfigError(
            f"--storage {remote.store.url}: {describe_error(error)}: run again when it responds"
        ) from None
