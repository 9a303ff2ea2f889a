"""Messages of Optuna and Ray that users of a search need not read; all other warnings appear.

The output of Ray's workers goes to Ray's log files; ``--verbose`` shows it.
"""

from __future__ import annotations

import logging
import re
import warnings

SUPPRESSED_WARNINGS = (
    # Experimental features of Optuna that are used deliberately: their tests run against the installed version.
    r"optuna\.study\.study\.Study\.set_metric_names is experimental",
    r"Argument ``group`` is an experimental feature",
    r"QMCSampler is experimental",
)
"""Regular expressions that match the start of Python warnings."""

SUPPRESSED_MESSAGES = {
    # A local Ray always has a token; a cluster without one is rejected with our own message.
    "ray._private.authentication.authentication_token_setup": r"Token authentication is enabled",
    # Tune writes no result files, because the trial store has the results.
    "ray.tune.analysis.experiment_analysis": r"Failed to fetch metrics",
    # A traceback of a process that died: the trial resumes, or fails with our own message.
    "ray.tune.execution.tune_controller": r"Trial task failed for trial",
    # The live view shows which trials wait for resources, and why.
    "ray.tune.execution.insufficient_resources_manager": r"Ignore this message if the cluster is autoscaling",
}
"""By logger, a regular expression that matches the start of a message of Ray."""


def quiet_optuna() -> None:
    """Suppress Optuna's known warnings, and its messages about each study and trial, which the live view shows."""
    import optuna  # here: processes that use only Ray do without it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for pattern in SUPPRESSED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)


def quiet_ray() -> None:
    """Suppress Ray's known messages."""
    for name in SUPPRESSED_MESSAGES:
        logging.getLogger(name).addFilter(_is_unknown)  # again has no effect


def _is_unknown(record: logging.LogRecord) -> bool:
    pattern = SUPPRESSED_MESSAGES.get(record.name)
    return pattern is None or not re.match(pattern, record.getMessage())
