"""Names of the user attributes that a study and its trials have in Optuna's database."""

from __future__ import annotations

# Attributes of a study.

FORMAT = "format"
"""Version of these attributes: ``STUDY_FORMAT``."""

STUDY_FORMAT = 2
"""Changes when an attribute is renamed or changes its meaning. Version 0.1.0 wrote none."""

BASE = "base"
"""The section ``base`` of the study file as written; a fork resolves the trials' configurations from it."""

DEFINITION = "definition"
"""What makes the study itself, see ``Study.definition``."""

CONFIRMING = "confirming"
"""Whether the last search confirms its best trials."""

FINALISTS = "finalists"
"""Numbers of the trials that were chosen for confirmation."""

CHAMPION = "champion"
"""The trial that the last search named, its mean and its seeds; Optuna's own best trial ignores confirmations."""

SCORES = "scores"
"""Scores by the published protocol of the encoders that the last search compared, by name of the encoder and the metric."""

PROVENANCE = "provenance"
"""How the last search was started: command, commit, package versions, and the service that got its events."""

SOURCES = "sources"
"""Studies whose trials must be transferred again, because the study's definition changed."""

IMPROVEMENT = "improvement"
"""The best scores (larger is better), and how many configurations had been looked at when they last improved; see
``csmae.tuning.stop_when``."""

ELAPSED_S = "elapsed_s"
"""Seconds that all runs of the study took."""

# Attributes of a trial.

REASON = "reason"
"""Why the trial failed, was cut short or was rejected."""

NOT_TRAINED = "not_trained"
"""Marks a trial that ended without training; it does not count as one of the study's trials."""

TRANSFERRED_FROM = "transferred_from"
"""Study and number of the trial that this one is a copy of."""

PROJECTED_FROM = "projected_from"
"""Study and number of the trial whose configuration, projected into the space, was enqueued as this trial."""

STARTING_POINT = "starting_point"
"""The starting point that the trial trains. It is never stopped early."""

CONFIRMS = "confirms"
"""Number of the trial that this one repeats with another seed.

A confirmation is never stopped early. It ends as PRUNED and has its objectives in ``RESULT``, so that it is never Optuna's
best trial. Samplers do not see it.
"""

SEED = "seed"
"""Seed of a confirmation."""

RESULT = "result"
"""Objectives of a confirmation that was trained to its last epoch."""

LAST_METRICS = "last_metrics"
"""Last values of the objectives and of the metrics under a constraint. Optuna keeps the first value of a constraint, so
constraints are set when the trial ends; after a restart, the values come from here."""

INTERRUPTED = "interrupted"
"""Why a budget cut the trial short before its first score. It resumes under its number."""

REJECTIONS = "rejections"
"""Points that were proposed for the trial and rejected, as fields of ``Rejection``."""

NUM_EPOCHS = "num_epochs"
"""Epochs of a trial whose last epochs had no scores."""

ASSIGNMENTS = "assignments"
"""The pieces in which the trial is trained, oldest first: ``{"from": epoch, "until": epoch, "reason": text}`` each.

The reason says why the trial was proposed or resumed. A piece at whose end the trial paused has ``"paused": epoch``; the trial
is paused as long as that piece is its last one.
"""

VIOLATIONS = "violations"
"""By how much a trial violated each constraint when it paused last; Optuna's own constraints are set when the trial ends."""

COMPLETED_EPOCHS = "completed_epochs"
"""``train.epochs`` when the trial was complete, before it grew. Such trials lead the others until one is complete again."""

STOPPED = "stopped"
"""Why the strategy stopped the trial for good."""

PARENT = "parent"
"""Number of the trial whose checkpoint this one started from; it does not count as one of the study's trials."""

LINEAGE = "lineage"
"""Of a trial with a parent: ``{"point": values of the first trial of the chain, "changes": train.changes since then}``."""

EPOCH_VALUES = "epoch_values/"
"""Prefix of one attribute per epoch with several objectives: Optuna's own curves hold one value."""

GPU_S, WORKER_S = "gpu_s", "worker_s"
"""Seconds of all the trial's GPUs, or of its workers where they have none."""
