"""User attributes that a study and its trials have in Optuna's database."""

from __future__ import annotations

NOT_TRAINED = "not_trained"
"""User attribute of a trial that was settled without training; it does not count as one of the study's trials."""


ORIGIN = "from"
"""User attribute of a trial that was taken over: the study and the number it had there."""


CONFIRMS = "confirms"
"""User attribute of a trial that repeats another one, whose number it holds, with another seed.

It ends as PRUNED, so that it is never Optuna's best trial; ``RESULT`` holds what came of it. Samplers do not see it.
"""


RESULT = "result"
"""User attribute of a repetition that was trained to its end: its objectives."""


FINALISTS = "finalists"
"""User attribute of a study: numbers of the trials that were chosen to be trained again with other seeds."""


CHAMPION = "champion"
"""User attribute of a study: the trial that its last search named, its mean and its seeds. Optuna's own best trial knows of no mean."""


MEASURED = "measured"
"""User attribute of a trial: its last objectives and metrics under a constraint. Optuna keeps the first value that a
constraint gets, so constraints are set when the trial ends, and a restart reads what they are judged by from here."""


START = "start"
"""User attribute of a trial that is never stopped early: a starting point, which it holds, or a repetition."""


CUT = "cut"
"""User attribute of a trial that waits because a budget cut it without a result: why. It resumes under its number."""


SOURCES = "sources"
"""User attribute of a study that got another definition: studies from which trials have yet to be taken over again."""


CONFIRMING = "confirming"
"""User attribute of a study: whether its last search trains the best trials again with other seeds."""


SPENT = {"runs_s", "gpu_s", "worker_s"}
"""User attributes of a study and of its trials that say what they took (see ``Budget``)."""


EPOCH = "epoch "
"""Prefix of user attributes, one an epoch, that hold several objectives: Optuna's own curves hold one value."""
