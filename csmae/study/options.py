"""The section ``search`` of a study file: how the space is explored, for which objectives, and for how long."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from csmae.config import ConfigError, MayChange, Section, changeable
from csmae.settings import did_you_mean
from csmae.study.metrics import COSTS, METRICS, SCORES
from csmae.study.pbt import Pbt

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

Direction = Literal["maximize", "minimize"]


def seconds(text: str) -> float:
    """Convert a duration such as ``90s``, ``30m``, ``1.5h`` or ``2d``.

    Raises:
        ValueError: The text is not a duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not match:
        raise ValueError("must be a number and a unit, such as 90s, 30m, 1.5h or 2d")
    return float(match[1]) * UNITS[match[2]]


def _check_duration(text: str) -> str:
    if seconds(text) == 0:
        raise ValueError("must be longer than 0")
    return text


Duration = Annotated[
    str,
    AfterValidator(_check_duration),
    WithJsonSchema({"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*[smhd]\s*$"}),
]


SIZES = {"MB": 1e6, "GB": 1e9, "TB": 1e12}


def num_bytes(text: str) -> float:
    """Convert a size such as ``500MB``, ``50GB`` or ``1.5 TB``.

    Raises:
        ValueError: The text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|TB)", text.strip())
    if not match:
        raise ValueError("must be a number and a unit, such as 500MB, 50GB or 1.5TB")
    return float(match[1]) * SIZES[match[2]]


def _check_size(text: str) -> str:
    num_bytes(text)
    return text


Size = Annotated[
    str,
    AfterValidator(_check_size),
    WithJsonSchema({"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(MB|GB|TB)\s*$"}),
]


def _parse_constraint(constraint: str) -> tuple[str, float]:
    """Split a constraint such as ``<= 30e6`` into its sign and its number.

    Raises:
        ValueError: The text is not a constraint.
    """
    sign, number = constraint.strip()[:2], constraint.strip()[2:]
    try:
        if sign in ("<=", ">="):
            return sign, float(number)
    except ValueError:
        pass
    raise ValueError("must be '<= number' or '>= number'")


def violation(value: float, constraint: str) -> float:
    """By how much a metric violates its constraint, such as ``<= 30e6``; not positive if it satisfies it."""
    sign, limit = _parse_constraint(constraint)
    return value - limit if sign == "<=" else limit - value


def _check_constraint(text: str) -> str:
    _parse_constraint(text)
    return text


Constraint = Annotated[
    str,
    AfterValidator(_check_constraint),
    WithJsonSchema({"type": "string", "pattern": r"^\s*[<>]=\s*[-+.\d]"}),
]


class Confirm(Section):
    """Confirmation: the best trials are repeated with other seeds, and the champion has the best mean."""

    top: int = Field(3, ge=1)
    """Trials to confirm."""
    seeds: int = Field(3, ge=1)
    """Further seeds for each; with ``race``, at most."""
    race: bool = True
    """Give further seeds only to the trials that may still win, and stop when the best one is clear. false trains each
    trial with all seeds, as many at a time as there are workers."""


def _num_trials(value: Any) -> Any:
    match = re.fullmatch(r"(\d+)\s*trials?", value.strip()) if isinstance(value, str) else None
    return int(match[1]) if match else value


NumTrials = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_num_trials),
    WithJsonSchema({"type": ["integer", "string"], "minimum": 1, "pattern": r"^\s*\d+\s*trials?\s*$"}),
]


class StopWhen(Section):
    """When a search proposes no further configurations before it has all of its trials. The first condition counts."""

    no_improvement: NumTrials | None = None
    """Trials, such as ``20 trials``, that were trained and paused, stopped or completed since the best one last improved."""
    terminator: bool = False
    """Optuna's terminator: further trials are expected to gain less than the error of a score over seeds. It judges
    trials that were trained to their end, at least 20, and one objective."""


class Search(Section):
    """How the space is explored. Most settings may change when the study is resumed."""

    may_change: ClassVar[MayChange] = MayChange.ON_STUDY_RESUME

    objectives: Annotated[dict[str, Direction], MayChange.NEVER] = Field(
        {"val/f1_mean": "maximize"}, min_length=1, json_schema_extra={"propertyNames": {"enum": [*SCORES, *COSTS]}}
    )
    """Metrics that decide, each with its direction. The first one orders the trials where one order is needed;
    several make a Pareto front. ``val/recall_at_1`` needs no labels; ``cost/params`` and ``cost/flops`` are
    known before any training."""
    constraints: Annotated[dict[str, Constraint], MayChange.NEVER] = Field(
        {}, json_schema_extra={"propertyNames": {"enum": list(METRICS)}}
    )
    """Bounds on metrics, such as ``cost/params: "<= 30e6"``. A configuration whose cost violates one is not trained; one
    whose measured metrics violate one cannot win. A loss term that a configuration does not compute, because its weight
    is 0, violates none."""
    num_trials: int = Field(32, ge=1)
    """Trials of the whole study, including those of earlier runs."""
    time_limit: Duration | None = None
    """Time limit of the study over all its runs, such as ``12h``."""
    gpu_hours: float | None = Field(None, gt=0)
    """GPU-hours of all workers together over all runs; hours of CPU workers if there are no GPUs."""
    sampler: Literal["auto", "tpe", "gp", "random", "qmc", "nsga2", "grid"] = "auto"
    """How configurations are proposed: tpe learns from earlier trials, gp suits few and expensive trials, grid
    takes every point of a finite space in random order. auto is tpe under asha, hyperband, median and none."""
    startup_trials: int = Field(8, ge=1)
    """Random configurations before tpe and gp start to learn."""
    seed: int = Field(0, ge=0)
    """Seed of the sampler."""
    strategy: Literal["auto", "asha", "hyperband", "median", "none", "pbt"] = "asha"
    """Which trials continue: asha, hyperband and median stop bad trials early, none trains every trial to its last epoch. auto
    pauses trials and continues those that a model of the scores expects to become best. pbt replaces bad trials by copies of good
    ones."""
    grace_epochs: int | None = Field(None, ge=1)
    """Epochs that every trial trains before it can be stopped; at most ``train.epochs``. Null: the strategy chooses, and
    asha, hyperband and median choose 1."""
    reduction: int = Field(3, ge=2)
    """asha and hyperband: at each rung one of this many trials continues. The rungs of asha are grace_epochs times its
    powers, those of hyperband train.epochs over its powers."""
    pbt: Pbt = Pbt()
    """Population based training, with ``strategy: pbt``; num_trials is the size of the population."""
    workers_per_trial: int = Field(1, ge=1)
    """DDP workers that train one trial together; divides ``optim.batch_size``."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs of a worker; null is one if the machine has GPUs, else none."""
    accelerator_type: str | None = None
    """Kind of GPU that all workers must have if a cluster has several, as Ray names it: ``A10G``, ``H100``."""
    retries: int = Field(2, ge=0)
    """How many restarts in a row, after a worker's death, may bring no new epoch; the next one fails the trial."""
    hang_timeout: Duration = "15m"
    """Time without a heartbeat after which a trial's workers count as dead; longer than the scoring of an epoch."""
    keep: int = Field(3, ge=1)
    """Best trials whose checkpoint and encoder are kept."""
    disk_limit: Size | None = None
    """Total size of the trials' checkpoints, such as ``50GB``. Beyond it, the paused trials that are least likely to resume
    lose theirs; if they resume all the same, they restart from scratch. Null is no limit."""
    start_from: list[dict[str, Any]] = Field([{}])
    """Points to try first, by dotted name; omitted fields have the base's value. The default is the base itself. These
    trials are never stopped early, so that later ones can be compared with them."""
    stop_when: StopWhen | None = None
    """When the search ends before it has all of its trials; null is never. Confirmations are trained afterwards."""
    confirm: Confirm | None = None
    """Confirmation of the best trials with other seeds; null is none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        invalid = [name for name in self.objectives if name not in (*SCORES, *COSTS)]
        if invalid or not any(name in SCORES for name in self.objectives):
            raise ConfigError(
                "search.objectives must be scores of an epoch, such as val/f1_mean, val/f1/s1_to_s2 or "
                f"val/recall_at_1, beside them costs ({', '.join(COSTS)}): found {', '.join(invalid or self.objectives)}"
                f"{did_you_mean(invalid[0], [*SCORES, *COSTS]) if invalid else ''}"
            )
        for name in self.constraints:
            if name not in METRICS:
                raise ConfigError(
                    f"search.constraints: no epoch reports {name!r}: name a score such as val/f1_mean, a cost such as "
                    f"cost/params, or what an epoch measures, such as time/epoch_s or train/loss{did_you_mean(name, METRICS)}"
                )
        if self.stop_when and self.stop_when.terminator and len(self.objectives) > 1:
            raise ConfigError("search.stop_when.terminator judges one objective: use no_improvement for several")
        if self.strategy == "median" and len(self.objectives) > 1:
            raise ConfigError("search.strategy median compares one objective: use asha or hyperband for several")
        return self

    def definition(self) -> dict[str, Any]:
        """The settings that must stay the same when the study is resumed."""
        free = {name.partition(".")[0] for name in changeable(MayChange.ON_STUDY_RESUME, Search)}  # whole sections
        fixed = self.model_dump(mode="json", exclude=free)
        goals = [f"{direction} {name}" for name, direction in self.objectives.items()]  # their order counts
        return {**fixed, "objectives": goals}

    @property
    def objective(self) -> str:
        """The first objective."""
        return next(iter(self.objectives))

    @property
    def signs(self) -> list[int]:
        """For each objective, 1 if larger is better, else -1."""
        return [1 if direction == "maximize" else -1 for direction in self.objectives.values()]
