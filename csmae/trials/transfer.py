"""Transfer of an earlier study's trials into a new one that could have trained them itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.config import Config, ConfigError, MayChange, changeable
from csmae.data.archive import data_name
from csmae.model.cost import cost_metrics
from csmae.settings import flatten, merge, parse_config
from csmae.study.metrics import COSTS
from csmae.study.options import violation
from csmae.study.study import Study
from csmae.study.values import decode_value
from csmae.trial_status import TrialStatus
from csmae.trials.attributes import BASE, DEFINITION, EPOCH_VALUES, TRANSFERRED_FROM
from csmae.trials.database import load_stored_study, report_database_errors
from csmae.trials.store import TrialStore
from csmae.trials.trial import result_of, status_of, with_seed


def load_source_study(path: Path, name: str, study: Study) -> optuna.Study:
    """Load a study whose trials a new one can use.

    Args:
        path: The database.
        name: The source study's.
        study: The new one.

    Raises:
        ConfigError: There is no such study, another program or version created it, or it has other objectives or another
            archive.
    """
    source = load_stored_study(path, name)
    attributes = source.user_attrs
    if DEFINITION not in attributes:
        raise ConfigError(
            f"study {name!r} in {path} was not created by this program, so no trial can be transferred: "
            "name a study of this program (--list)"
        )
    if attributes[DEFINITION]["search"]["objectives"] != study.definition()["search"]["objectives"]:
        raise ConfigError(
            f"study {name!r} had other objectives, so no trial can be transferred: "
            "name another study, or start a new one with --name"
        )
    before, now = (parse_config(base, "base").data for base in (attributes[BASE], study.base))
    if (before.path, before.splits_dir) != (now.path, now.splits_dir) and data_name(before) != data_name(now):
        raise ConfigError(
            f"study {name!r} had another archive, {before.path}: its scores do not compare: "
            "name another study, or start a new one with --name"
        )
    return source


def transfer_trials(trial_store: TrialStore, source: optuna.Study) -> int:
    """Copy the ended trials of another study for which the new space has a point with the same configuration.

    Returns:
        Number of trials copied, without those copied before.
    """
    attributes = [trial.user_attrs for trial in trial_store.all_trials()]
    copied = {tuple(known[TRANSFERRED_FROM]) for known in attributes if TRANSFERRED_FROM in known}
    count = 0
    with report_database_errors(trial_store.path):
        for trial in source.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            origin = trial.user_attrs.get(TRANSFERRED_FROM, [source.study_name, trial.number])
            if status_of(trial) is TrialStatus.REJECTED or tuple(origin) in copied:
                continue
            if copy := _copy(trial_store.study, source, trial, origin):
                trial_store.optuna_study.add_trial(copy)
                count += 1
        trial_store.drop_source(source.study_name)
    return count


def _copy(study: Study, source: optuna.Study, trial: FrozenTrial, origin: list[Any]) -> FrozenTrial | None:
    """A source trial as one of the new study; None if the new study could not have trained or judged it."""
    try:
        values = {name: _value(study, name, stored) for name, stored in trial.params.items()}
        config = parse_config(merge(source.user_attrs[BASE], with_seed(trial, values)), "")
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
