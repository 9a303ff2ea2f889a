"""What a search came to: its champion beside the default configuration and an untrained encoder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from csmae.cluster.reserved import NoResourcesError, run_reserved
from csmae.cluster.session import ACCELERATOR, KIND_UNIT, Allocation
from csmae.config import Config, ConfigError
from csmae.scratch import scratch
from csmae.storage.manifest import Files, RemoteFolder
from csmae.storage.object_store import reason, retry
from csmae.trials.leaderboard import entries
from csmae.trials.store import TrialStore

CHECKPOINT = "checkpoint.pt"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderToScore:
    """An encoder to score."""

    name: str
    config: Config
    trial: FrozenTrial | None
    """None for the untrained encoder."""
    encoder_dir: Path | None


def encoders_to_score(trial_store: TrialStore) -> list[EncoderToScore]:
    """The untrained encoder, the default configuration where it was trained to its end, and the champion.

    Returns:
        Worst expected first; empty where no trial came to its end.
    """
    there = (s for s in entries(trial_store) if trial_store.encoder_dir(s.trial.number).exists())
    best = next(there, None)
    if best is None:
        return []
    study = trial_store.study
    found = [EncoderToScore("untrained encoder", study.resolve({}), None, None)]
    base = study.space.point({})
    default = next(
        (t for t in trial_store.explored() if trial_store.values(t) == base and t.state is TrialState.COMPLETE), None
    )
    for name, trial in (("default configuration", default), ("champion", best.trial)):
        if trial is not None and (folder := trial_store.encoder_dir(trial.number)).exists():
            found.append(EncoderToScore(name, study.resolve(trial_store.values(trial)), trial, folder))
    return found


def saved_metrics(encoder_dir: Path) -> dict[str, float]:
    """Metrics of the epoch after which an encoder was saved."""
    content = json.loads((encoder_dir / "config.json").read_text(encoding="utf-8"))
    return dict(content["details"]["metrics"])


def score_encoders(
    found: list[EncoderToScore],
    allocation: Allocation,
    files: Files | None = None,
    say: Callable[[str], object] = log.warning,
) -> list[dict[str, float]]:
    """Score by the published protocol, side by side on Ray's machines; on CPUs where the GPUs are gone.

    Args:
        found: What to score.
        allocation: What each may take.
        files: Where their encoders are, if not in a folder that all nodes share.
        say: Told in a line where resources are waited for in vain.

    Returns:
        For each candidate ``test/f1_mean``, ``test/f1/s1_to_s1`` and the like.

    Raises:
        NoResourcesError: There are no CPUs either.
    """
    calls = [
        (c.config, c.encoder_dir, files.of(c.encoder_dir.parent) if files and c.encoder_dir else None) for c in found
    ]
    kind = {f"{ACCELERATOR}{allocation.accelerator_type}": KIND_UNIT} if allocation.accelerator_type else {}
    wanted = (
        {"CPU": allocation.cpus_per_worker}
        | ({"GPU": allocation.gpus_per_worker} if allocation.gpus_per_worker else {})
        | kind
    )
    try:
        return run_reserved(_score, calls, wanted)
    except NoResourcesError as error:
        if not (allocation.gpus_per_worker or kind):
            raise
        say(f"{error}: the encoders are scored on CPUs")
    return run_reserved(_score, [(*call, "cpu") for call in calls], {"CPU": 1.0})


def _score(
    config: Config, folder: Path | None, files: RemoteFolder | None, device: str | None = None
) -> dict[str, float]:
    from csmae.training.scoring import score

    if files is None:
        return score(config, folder, device)
    with scratch("score") as copy:
        retry(lambda: files.fetch(copy, files.manifest(), lambda name: name.startswith("encoder/")))
        return score(config, copy / "encoder", device)


def download_trials(trial_store: TrialStore) -> None:
    """Fetch what a bucket holds of the trials, checkpoints excepted, to the driver's copy.

    Raises:
        ConfigError: The bucket does not answer, or another driver took the storage over.
    """
    files = trial_store.files
    if files is None:
        return
    trials = trial_store.run_dir(0).parent
    try:
        retry(files.check)
        for name in retry(lambda: files.bucket.names(trials.relative_to(files.folder).as_posix())):
            trial = files.of(trials / name)
            state = retry(trial.manifest)
            retry(partial(trial.fetch, trials / name, state, lambda path: path != CHECKPOINT))
    except OSError as error:
        raise ConfigError(f"--storage {files.bucket.url}: {reason(error)}: run again when it does") from None
