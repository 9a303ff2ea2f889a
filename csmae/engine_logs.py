"""Messages of Optuna and Ray that users of a search need not read; all other warnings appear.

The output of Ray's workers goes to Ray's log files; ``--verbose`` shows it.
"""

from __future__ import annotations

import logging
import re
import warnings

WARNING = "warning"

SUPPRESSED = (
    # Experimental features of Optuna that are used deliberately: their tests run against the installed version.
    (WARNING, r"optuna\.study\.study\.Study\.set_metric_names is experimental"),
    (WARNING, r"Argument ``group`` is an experimental feature"),
    (WARNING, r"QMCSampler is experimental"),
    # A local Ray always has a token; a cluster without one is rejected with our own message.
    ("ray._private.authentication.authentication_token_setup", r"Token authentication is enabled"),
    # Tune writes no result files, because the trial store has the results.
    ("ray.tune.analysis.experiment_analysis", r"Failed to fetch metrics"),
    # A traceback of a process that died: the trial resumes, or fails with our own message.
    ("ray.tune.execution.tune_controller", r"Trial task failed for trial"),
    # The live view shows which trials wait for resources, and why.
    ("ray.tune.execution.insufficient_resources_manager", r"Ignore this message if the cluster is autoscaling"),
)
"""Logger of each message, or ``WARNING`` for a Python warning, and a regular expression that matches its start."""


def quiet_optuna() -> None:
    """Suppress Optuna's known warnings, and its messages about each study and trial, which the live view shows."""
    import optuna  # here: processes that use only Ray do without it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for source, pattern in SUPPRESSED:
        if source == WARNING:
            warnings.filterwarnings("ignore", pattern)


def quiet_ray() -> None:
    """Suppress Ray's known messages."""
    for source, pattern in SUPPRESSED:
        logger = logging.getLogger(source)
        if source != WARNING and not any(isinstance(known, _Filter) for known in logger.filters):
            logger.addFilter(_Filter(pattern))


class _Filter(logging.Filter):
    """Drops the records whose message starts with a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self._pattern.match(record.getMessage())
