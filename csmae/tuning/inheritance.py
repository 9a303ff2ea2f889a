"""Taking over what an earlier study found, as far as it says something about a new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from csmae.config import Config, ConfigError
from csmae.settings import did_you_mean, flatten, merge, parse_config
from csmae.tuning.ledger import NOT_TRAINED, Ledger, open_storage, unusable
from csmae.tuning.study import Study

ORIGIN = "from"
"""User attribute of a trial that was taken over: the study and the number it had there."""

FREE = ("data.path", "data.splits_dir", "train.checkpoint_every", "eval.batch_size")
"""Fields in which a trial may differ from what the new study would train."""


def ancestor(path: Path, name: str, study: Study) -> optuna.Study:
    """An earlier study that a new one shall take over from.

    Args:
        path: Of the database.
        name: Of the earlier study.
        study: The new one.

    Raises:
        ConfigError: There is no such study, or it had other objectives.
    """
    names = study_names(path)
    if name not in names:
        raise ConfigError(f"there is no study {name!r} in {path}{did_you_mean(name, names)}")
    old = optuna.load_study(study_name=name, storage=open_storage(path))
    if old.user_attrs["definition"]["search"]["objectives"] != study.search.objectives:
        raise ConfigError(f"study {name!r} had other objectives: nothing of it can be taken over")
    return old


def take_over(ledger: Ledger, old: optuna.Study) -> int:
    """Write the finished trials of another study into a new one, where the new one could have trained them itself.

    That is, where the new space has a point that makes the very configuration of the old trial.

    Returns:
        Trials taken over, not counting those taken over before.
    """
    name = old.study_name
    known = {tuple(trial.user_attrs[ORIGIN]) for trial in ledger.all_trials() if ORIGIN in trial.user_attrs}
    taken = 0
    for trial in old.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        point = _point(ledger.study, old.user_attrs["said"], trial)
        if point is not None and (name, trial.number) not in known and NOT_TRAINED not in trial.user_attrs:
            ledger.optuna.add_trial(_copy(ledger.study, name, trial, point))
            taken += 1
    return taken


def study_names(path: Path) -> list[str]:
    """Studies in a database, oldest first; none where there is no database.

    Raises:
        ConfigError: The database cannot be used.
    """
    if not path.exists():
        return []
    try:
        return optuna.get_all_study_names(open_storage(path))
    except (SQLAlchemyError, RuntimeError, OSError) as error:
        raise ConfigError(unusable(path, error)) from None


def _point(study: Study, said: Mapping[str, Any], trial: FrozenTrial) -> dict[str, Any] | None:
    """The point of the new space that makes an old trial's configuration; None where there is none."""
    seed = {"train.seed": trial.user_attrs["seed"]} if "seed" in trial.user_attrs else {}
    try:
        config = parse_config(merge(said, trial.params | seed), "")
        values = dict(flatten(config.model_dump()))
        point = study.space.point(values)
        if all(value in study.space.domains[name] for name, value in point.items()) and _same(config, study, point):
            return point
    except ConfigError:  # a field that is no more, or a point that does not go together
        return None
    return None


def _same(config: Config, study: Study, point: Mapping[str, Any]) -> bool:
    old, new = (dict(flatten(c.model_dump())) for c in (config, study.resolve(point)))
    return all(old[name] == new[name] for name in old if name not in FREE)


def _copy(study: Study, name: str, trial: FrozenTrial, point: dict[str, Any]) -> FrozenTrial:
    attributes = {key: value for key, value in trial.user_attrs.items() if key.startswith("epoch ")}
    return optuna.create_trial(
        state=trial.state,
        values=trial.values,
        params=point,
        distributions={key: study.space.domains[key].distribution for key in point},
        user_attrs={**attributes, NOT_TRAINED: True, ORIGIN: [name, trial.number]},
        intermediate_values=trial.intermediate_values,
    )
