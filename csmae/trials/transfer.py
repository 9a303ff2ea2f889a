"""Transfer from another study: trials that this study could have trained itself are copied, its best configurations are enqueued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.config import Config, ConfigError, MayChange, changeable
from csmae.model.cost import cost_metrics
from csmae.settings import flatten, merge, parse_config
from csmae.study.metrics import COSTS
from csmae.study.options import violation
from csmae.study.study import Study
from csmae.study.values import Value, decode_value
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import BASE, DEFINITION, EPOCH_VALUES, PROJECTED_FROM, STARTING_POINT, TRANSFERRED_FROM
from csmae.trials.database import load_stored_study, report_database_errors
from csmae.trials.lineage import trained_values
from csmae.trials.projection import Similarity, best_points, compare_data
from csmae.trials.store import TrialStore
from csmae.trials.trial import params_of, result_of, status_of


class Transferred(NamedTuple):
    """What a study got from another one."""

    num_copied: int
    """Trials that were copied, without those copied before."""
    num_enqueued: int
    """Best configurations that were enqueued, without those enqueued before."""


def load_source_study(path: Path, name: str, study: Study) -> optuna.Study:
    """Load a study from which a new one can learn.

    Args:
        path: The database.
        name: The source study's.
        study: The new one.

    Raises:
        ConfigError: There is no such study, another program or version created it, or its first objective is another one.
    """
    source = load_stored_study(path, name)
    if DEFINITION not in source.user_attrs:
        raise ConfigError(
            f"study {name!r} in {path} was not created by this program, so no trial can be transferred: "
            "name a study of this program (--list)"
        )
    before, now = _objectives(source)[0], study.definition()["search"]["objectives"][0]
    if before != now:
        raise ConfigError(
            f"study {name!r} had another first objective, {before!r} instead of {now!r}, so its trials do not compare: "
            "name another study, or start a new one with --name"
        )
    return source


def _objectives(source: optuna.Study) -> list[str]:
    objectives: list[str] = source.user_attrs[DEFINITION]["search"]["objectives"]
    return objectives


def incomparable(source: optuna.Study, study: Study) -> str | None:
    """Say why no trial of another study has a score that this study's trials compare with; None if they do."""
    if _objectives(source) != study.definition()["search"]["objectives"]:
        return "it had other objectives"
    if compare_data(source, study) is not Similarity.SAME:
        return f"it had another archive, {parse_config(source.user_attrs[BASE], 'base').data.path}"
    return None


def transfer_trials(trial_store: TrialStore, source: optuna.Study) -> Transferred:
    """Copy the ended trials of another study for which the new space has a point with the same configuration.

    The best configurations of the source for which it has none are projected into the space and enqueued after the starting
    points; unlike these, they may be stopped early.
    """
    with report_database_errors(trial_store.path):
        num_copied = 0 if incomparable(source, trial_store.study) else _copy_trials(trial_store, source)
        num_enqueued = _enqueue_best(trial_store, source)
        trial_store.drop_source(source.study_name)
    return Transferred(num_copied, num_enqueued)


def describe_transfer(source: optuna.Study, study: Study, transferred: Transferred) -> str:
    """Say in one line what a study got from another one."""
    reason = incomparable(source, study)
    copied = f"no trial is copied, because {reason}" if reason else f"{transferred.num_copied} trials copied"
    return f"study {source.study_name}: {copied}; {transferred.num_enqueued} of its best configurations become starting points"


def _copy_trials(trial_store: TrialStore, source: optuna.Study) -> int:
    attributes = [trial.user_attrs for trial in trial_store.all_trials()]
    copied = {tuple(known[TRANSFERRED_FROM]) for known in attributes if TRANSFERRED_FROM in known}
    count = 0
    for trial in source.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        origin = trial.user_attrs.get(TRANSFERRED_FROM, [source.study_name, trial.number])
        if status_of(trial) is TrialStatus.REJECTED or tuple(origin) in copied:
            continue
        if copy := _copy(trial_store.study, source, trial, origin):
            trial_store.optuna_study.add_trial(copy)
            count += 1
    return count


def _enqueue_best(trial_store: TrialStore, source: optuna.Study) -> int:
    """Enqueue the source's best configurations, unless the study has the same point, or the cost violates a constraint."""
    study, trials = trial_store.study, trial_store.all_trials()
    known = [trial.user_attrs[STARTING_POINT] for trial in trials if STARTING_POINT in trial.user_attrs]
    known += [params_of(trial) for trial in trials]
    origins = [trial.user_attrs.get(PROJECTED_FROM) for trial in trials]
    count = 0
    for number, point in best_points(source, study, compare_data(source, study)):
        origin = [source.study_name, number]
        if origin not in origins and point not in known and not _exceeds_costs(study, point):
            trial_store.enqueue(point, **{PROJECTED_FROM: origin})
            known.append(point)
            count += 1
    return count


def _exceeds_costs(study: Study, point: Mapping[str, Value]) -> bool:
    bounds = {name: bound for name, bound in study.search.constraints.items() if name in COSTS}
    metrics = cost_metrics(study.resolve(point)) if bounds else {}
    return any(violation(metrics[name], bound) > 0 for name, bound in bounds.items())


def _copy(study: Study, source: optuna.Study, trial: FrozenTrial, origin: list[Any]) -> FrozenTrial | None:
    """A source trial as one of the new study; None if the new study could not have trained or judged it."""
    try:
        values = {name: _value(study, name, stored) for name, stored in trial.params.items()}
        config = parse_config(merge(source.user_attrs[BASE], trained_values(trial, values)), "")
        point = study.space.point(dict(flatten(config.model_dump())))
        inside = all(value in study.space.domains[name] for name, value in point.items())
        if not inside or not _is_same_training(config, study.resolve(point)):
            return None
    except ConfigError:  # the configuration has lost a field, or the new study rejects the combination
        return None
    constraints = _constraints(study, source, trial, config)
    if constraints is None:
        return None
    result = result_of(trial)
    curve = {key: value for key, value in trial.user_attrs.items() if key.startswith(EPOCH_VALUES)}
    return optuna.create_trial(
        state=trial.state if result is None else TrialState.COMPLETE,
        values=trial.values if result is None else result,
        params=study.space.encode(point),
        distributions={key: study.space.domains[key].distribution for key in point},
        user_attrs={**curve, TRANSFERRED_FROM: origin},
        intermediate_values=trial.intermediate_values,
        constraints=constraints,
    )


def _value(study: Study, name: str, stored: Any) -> Any:
    """A source trial's value with the digits of the new study's steps."""
    value, domain = decode_value(name, stored), study.space.domains.get(name)
    return domain.fit(value) if domain and value in domain else value


def _is_same_training(one: Config, other: Config) -> bool:
    """Whether two configurations on the same archive train the same."""
    values, others = (dict(flatten(config.model_dump())) for config in (one, other))
    return all(values[name] == others[name] for name in values.keys() - changeable(MayChange.ON_STUDY_RESUME))


def _constraints(study: Study, source: optuna.Study, trial: FrozenTrial, config: Config) -> dict[str, float] | None:
    """By how much a source trial violates the new study's constraints; None if a metric is unknown."""
    found, before = {}, source.user_attrs[DEFINITION]["search"]["constraints"]
    for name, constraint in study.search.constraints.items():
        if name in COSTS:
            found[name] = violation(cost_metrics(config)[name], constraint)
        elif before.get(name) == constraint and name in trial.constraints:
            found[name] = trial.constraints[name]
        else:
            return None
    return found
