"""What Optuna and Ray say that a user of a search need not read: each message by its text, with the reason.

Whatever else they warn of is shown. What Ray's workers print goes to Ray's log files; ``--verbose`` shows it.
"""

from __future__ import annotations

import logging
import re
import warnings

OPTUNA_WARNINGS = (
    # They are used knowingly: their tests run against the installed Optuna.
    r"optuna\.study\.study\.Study\.set_metric_names is experimental",
    r"Argument ``group`` is an experimental feature",
    r"QMCSampler is experimental",
)

RAY_LOGS = {
    # Ours has a token because it is to have one; clusters without are refused in our words.
    "ray._private.authentication.authentication_token_setup": r"Token authentication is enabled",
    # Tune writes no files of results, for the study's database has them.
    "ray.tune.analysis.experiment_analysis": r"Failed to fetch metrics",
    # With a traceback, of a process that died: the trial goes on, or fails with the reason in our words.
    "ray.tune.execution.tune_controller": r"Trial task failed for trial",
    # Where trials wait for resources the view says which, and why.
    "ray.tune.execution.insufficient_resources_manager": r"Ignore this message if the cluster is autoscaling",
}
"""By logger, the start of its message."""


def quiet_optuna() -> None:
    """Hide what Optuna says of each study and trial (the view shows them), and the known warnings."""
    import optuna  # here: a process that only speaks to Ray goes without

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for message in OPTUNA_WARNINGS:
        warnings.filterwarnings("ignore", message)


def quiet_ray() -> None:
    """Hide Ray's known messages."""
    for name, start in RAY_LOGS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hidden) for known in logger.filters):
            logger.addFilter(_Hidden(start))


class _Hidden(logging.Filter):
    """Drops the records whose message begins with a pattern."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = re.compile(start)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        return not self._start.match(record.getMessage())
