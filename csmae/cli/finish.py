"""The end of a search: its best encoders are scored, registered and reported."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import RayError

from csmae.cluster.reserved import NoResourcesError
from csmae.cluster.resources import Allocation
from csmae.console.format import format_settings
from csmae.console.tables import format_best_trials, format_importances, format_scores
from csmae.console.terminal import plain_console, print_line
from csmae.data.archive import data_name
from csmae.sqlite import sqlite_url
from csmae.tracking.destination import WANDB
from csmae.tracking.fetch import DEFAULT_DATABASE
from csmae.tracking.provenance import command
from csmae.tracking.registry import MODEL, study_alias
from csmae.tracking.tracker import Tracker
from csmae.trials.attributes import REASON
from csmae.trials.growth import former_champion
from csmae.trials.importance import importances
from csmae.trials.leaderboard import leaderboard
from csmae.trials.lineage import describe_copy
from csmae.trials.store import TrialStore
from csmae.trials.trial import num_restarts, params_of
from csmae.tuning.champion import (
    EncoderToScore,
    download_trials,
    encoders_to_score,
    saved_metrics,
    score_encoders,
    write_configuration,
)
from csmae.tuning.race import describe_lead


def finish(trial_store: TrialStore, tracker: Tracker, allocation: Allocation) -> bool:
    """Score, register and report the champion.

    Args:
        trial_store: Trials of the study.
        tracker: Receives the registered encoders and the report.
        allocation: Resources for scoring.

    Returns:
        Whether there is a champion and every encoder was scored.
    """
    download_trials(trial_store)
    if (former := former_champion(trial_store.optuna_study)) is not None:
        _publish(tracker, trial_store)
        epochs = trial_store.study.space.base["train.epochs"]
        print_line(f"champion: trial {former} stays registered: no trial has completed {epochs} epochs yet")
        return True
    encoders = encoders_to_score(trial_store)
    if not encoders:
        print_line(f"no champion: {_last_reason(trial_store)}")
        return False
    try:
        rows = score_encoders(encoders, allocation, trial_store.remote, print_line)
    except (RayError, NoResourcesError) as error:
        print_line(f"the published protocol could not be computed: {str(error).splitlines()[-1]}")
        rows = [{} for _ in encoders]
    scores = {encoder.name: row for encoder, row in zip(encoders, rows, strict=True)}
    champion = encoders[-1]
    _register(tracker, trial_store, champion, scores)
    if all(rows):
        plain_console().print(format_scores(scores))
    _publish(tracker, trial_store)
    if restarts := sum(num_restarts(trial) for trial in trial_store.trials()):
        print_line(
            f"restarted from scratch {restarts} times, as search.disk_limit had removed the checkpoints of paused trials"
        )
    for line in (*format_importances(trial_store), *_next_steps(trial_store, champion, tracker.shown_uri)):
        print_line(line)
    return all(rows)


def _publish(tracker: Tracker, trial_store: TrialStore) -> None:
    """Write the report and print the best trials."""
    from csmae.reporting.report import Report, publish  # matplotlib takes a second

    publish(tracker, Report(trial_store.optuna_study, trial_store.folder))
    plain_console().print(format_best_trials(trial_store))


def _last_reason(trial_store: TrialStore) -> str:
    reasons = [str(trial.user_attrs[REASON]) for trial in trial_store.trials() if REASON in trial.user_attrs]
    return f"no trial completed; the last one: {reasons[-1]}" if reasons else "no trial completed"


def _register(
    tracker: Tracker, trial_store: TrialStore, champion: EncoderToScore, scores: dict[str, dict[str, float]]
) -> None:
    """Register the champion's encoder with its scores, log the other best encoders and the study's summary."""
    assert champion.trial is not None and champion.encoder_dir is not None
    board = leaderboard(trial_store.optuna_study)
    best = next(entry for entry in board.entries if entry.trial.number == champion.trial.number)
    if best is not board.entries[0]:
        first = board.entries[0].trial.number
        print_line(
            f"trial {first} is best, but {trial_store.encoder_dir(first)} no longer exists: using trial {best.trial.number}"
        )
    confirmed = {"confirm/mean": best.mean, "confirm/spread": best.spread} if best.num_seeds > 1 else {}
    tags = {"csmae.study": trial_store.study.name, "csmae.data": data_name(champion.config.data)}
    for entry in board.entries[: trial_store.study.search.keep]:
        number, folder = entry.trial.number, trial_store.encoder_dir(entry.trial.number)
        if number != champion.trial.number and folder.exists():
            tracker.encoder(number, folder, saved_metrics(folder), tags)
    metrics = saved_metrics(champion.encoder_dir) | scores[champion.name] | confirmed
    tags["csmae.seeds"] = str(best.num_seeds)
    tracker.champion(champion.trial.number, champion.encoder_dir, metrics, tags, best.mean)
    trial_store.record_champion(best.trial.number, best.mean, best.num_seeds)
    trial_store.record_scores(scores)
    summary = {f"scores/{encoder}/{name}": value for encoder, row in scores.items() for name, value in row.items()}
    shares = {f"importance/{name}": share for name, share in importances(trial_store.optuna_study).items()}
    tracker.finish(summary | shares | confirmed)


def _next_steps(trial_store: TrialStore, champion: EncoderToScore, shown_uri: str) -> Iterator[str]:
    assert champion.trial is not None and champion.encoder_dir is not None
    trial = " ".join(filter(None, [f"trial {champion.trial.number}", describe_copy(champion.trial)]))
    yield f"champion: {trial} with {format_settings(params_of(champion.trial))}"
    board = leaderboard(trial_store.optuna_study)
    if (lead := describe_lead(board)) and board.entries[0].trial.number == champion.trial.number:
        yield f"verdict:  {lead}"
    yield f"encoder:  {champion.encoder_dir}"
    yield f"repeat:   csmae train {shlex.quote(str(write_configuration(trial_store, champion.trial)))}"
    yield f"report:   {trial_store.folder / 'report.html'}"
    yield from usage_lines(shown_uri, trial_store.folder, champion.encoder_dir)
    same = re.sub(r" --num-trials[ =]\S+", "", command())
    yield f"extend:   {same} --num-trials N"


def usage_lines(shown_uri: str, folder: Path, encoder_dir: Path) -> Iterator[str]:
    """How to load the champion and compare the trials.

    Args:
        shown_uri: Tracking URI of the study, without a password.
        folder: Folder of the study.
        encoder_dir: Folder of the champion's encoder.
    """
    if shown_uri.startswith(WANDB):
        yield f"load it:  csmae.load_encoder({json.dumps(str(encoder_dir), ensure_ascii=False)})"
        yield f"compare:  project {shown_uri.removeprefix(WANDB)} of Weights & Biases, group {folder.name}"
        if os.environ.get("WANDB_MODE") == "offline":
            yield f"send:     wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"
        return
    name = f"models:/{MODEL}@{study_alias(folder.name)}"
    yield f"load it:  csmae.load_encoder({json.dumps(name, ensure_ascii=False)})"
    if shown_uri != sqlite_url(DEFAULT_DATABASE):
        yield f"          with MLFLOW_TRACKING_URI={shlex.quote(shown_uri)}"
    is_server = shown_uri.startswith("http")
    yield f"compare:  {shown_uri if is_server else f'mlflow ui --backend-store-uri {shlex.quote(shown_uri)}'}"
