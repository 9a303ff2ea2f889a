"""Taking over what an earlier study found, as far as it says something about a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from csmae.config import ANY_RUN, Config, ConfigError, may_change
from csmae.data.archive_name import data_name
from csmae.settings import did_you_mean, flatten, merge, parse_config
from csmae.study.metrics import COSTS
from csmae.study.study import Study
from csmae.study.values import unpacked
from csmae.trials.attributes import EPOCH, NOT_TRAINED, ORIGIN
from csmae.trials.constraints import known_metrics, violation
from csmae.trials.database import open_storage, usable
from csmae.trials.store import TrialStore
from csmae.trials.trial import result_of, with_seed


def load_source_study(path: Path, name: str, study: Study) -> optuna.Study:
    """An earlier study that a new one shall take over from.

    Args:
        path: Of the database.
        name: Of the earlier study.
        study: The new one.

    Raises:
        ConfigError: There is no such study, it is another program's, or it had other objectives or another archive.
    """
    names = study_names(path)
    if name not in names:
        raise ConfigError(f"there is no study {name!r} in {path}{did_you_mean(name, names)}")
    with usable(path):
        old = optuna.load_study(study_name=name, storage=open_storage(path))
        attributes = old.user_attrs
    if "definition" not in attributes:
        raise ConfigError(
            f"study {name!r} in {path} was not created by this program: nothing of it can be taken over: name a study of this program (--list)"
        )
    if attributes["definition"]["search"]["objectives"] != study.definition()["search"]["objectives"]:
        raise ConfigError(
            f"study {name!r} had other objectives: nothing of it can be taken over: name another study, or begin one with --name"
        )
    before, now = (parse_config(said, "base").data for said in (attributes["said"], study.base))
    if (before.path, before.splits_dir) != (now.path, now.splits_dir) and data_name(before) != data_name(now):
        raise ConfigError(
            f"study {name!r} had another archive, {before.path}: its scores do not compare: name another study, or begin one with --name"
        )
    return old


def transfer_trials(trial_store: TrialStore, old: optuna.Study) -> int:
    """Write the finished trials of another study into a new one, where the new one could have trained them itself.

    That is, where the new space has a point that makes the very configuration of the old trial.

    Returns:
        Trials taken over, not counting those taken over before.
    """
    known = {tuple(trial.user_attrs[ORIGIN]) for trial in trial_store.all_trials() if ORIGIN in trial.user_attrs}
    taken = 0
    with usable(trial_store.path):
        for trial in old.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
            origin = trial.user_attrs.get(ORIGIN, [old.study_name, trial.number])
            trained = ORIGIN in trial.user_attrs or NOT_TRAINED not in trial.user_attrs
            if trained and tuple(origin) not in known and (copy := _copy(trial_store.study, old, trial, origin)):
                trial_store.optuna_study.add_trial(copy)
                taken += 1
        trial_store.drop_source(old.study_name)
    return taken


def study_names(path: Path) -> list[str]:
    """Studies in a database, oldest first; none where there is no database.

    Raises:
        ConfigError: The database cannot be used.
    """
    if not path.exists():
        return []
    with usable(path):
        return optuna.get_all_study_names(open_storage(path))


def _copy(study: Study, old: optuna.Study, trial: FrozenTrial, origin: list[Any]) -> FrozenTrial | None:
    """An old trial as one of the new study; None where the new one could not have trained it, or not judged it."""
    try:
        values = {name: _value(study, name, stored) for name, stored in trial.params.items()}
        config = parse_config(merge(old.user_attrs["said"], with_seed(trial, values)), "")
        point = study.space.point(dict(flatten(config.model_dump())))
        inside = all(value in study.space.domains[name] for name, value in point.items())
        if not inside or not _same(config, study.resolve(point)):
            return None
    except ConfigError:  # a field that is no more, or a point that does not go together
        return None
    constraints = _constraints(study, old, trial, config)
    if constraints is None:
        return None
    result = result_of(trial)
    curve = {key: value for key, value in trial.user_attrs.items() if key.startswith(EPOCH)}
    return optuna.create_trial(
        state=trial.state if result is None else TrialState.COMPLETE,
        values=trial.values if result is None else result,
        params=study.space.encode(point),
        distributions={key: study.space.domains[key].distribution for key in point},
        user_attrs={**curve, NOT_TRAINED: True, ORIGIN: origin},
        intermediate_values=trial.intermediate_values,
        constraints=constraints,
    )


def _value(study: Study, name: str, stored: Any) -> Any:
    """An old trial's value, with the digits that the new study's steps have."""
    value, domain = unpacked(name, stored), study.space.domains.get(name)
    return domain.fit(value) if domain and value in domain else value


def _same(old: Config, new: Config) -> bool:
    """Whether two configurations on the same archive train the same."""
    one, other = (dict(flatten(config.model_dump())) for config in (old, new))
    return all(one[name] == other[name] for name in one.keys() - may_change(ANY_RUN))


def _constraints(study: Study, old: optuna.Study, trial: FrozenTrial, config: Config) -> dict[str, float] | None:
    """By how much an old trial breaks the new study's constraints; None where one cannot be told."""
    found, before = {}, old.user_attrs["definition"]["search"]["constraints"]
    for name, wanted in study.search.constraints.items():
        if name in COSTS:
            found[name] = violation(known_metrics(config)[name], wanted)
        elif before.get(name) == wanted and name in trial.constraints:
            found[name] = trial.constraints[name]
        else:
            return None
    return found
