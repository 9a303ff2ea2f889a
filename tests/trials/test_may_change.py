"""What may change in a resumed study, in a resumed training, and before a trial was trained."""

from pathlib import Path
from typing import Any

import pytest

from csmae.config import ConfigError, MayChange, changeable
from csmae.settings import FIELDS
from csmae.storage.layout import DATABASE
from csmae.study.study import Study, load_study
from csmae.training.checkpoint import (
    CheckpointError,
    TrainingProgress,
    config_fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from csmae.trials.budget import Budget
from csmae.trials.redefinition import differences
from csmae.trials.store import TrialStore
from csmae.trials.transfer import load_source_study, transfer_trials
from tests.conftest import small_config
from tests.study.test_study import write
from tests.tuning.test_searcher import SPACE, make_searcher, make_study, result

FREE = {
    "data.on_error": "skip",
    "data.path": "/elsewhere",
    "data.splits_dir": "/elsewhere",
    "optim.micro_batch_size": 2,
    "train.compile": True,
    "train.precision": "bf16",
    "train.checkpoint_every": 3,
    "eval.batch_size": 32,
}
SCORING = {"eval.every": 2, "eval.k": 2, "eval.max_pairs": 20}
MEANT = {"optim.lr": 1e-2, "data.horizontal_flip": 0.0, "model.pooling": "cls", "train.seed": 3}


def changed(folder: Path, name: str, value: object, study: str | None = None) -> Study:
    return load_study(write(folder, SPACE, num_trials=3), study, [f"{name}={value}"])


def test_what_may_change_is_marked_on_the_fields() -> None:
    assert changeable(MayChange.ON_STUDY_RESUME) == FREE.keys()
    assert changeable(MayChange.ON_TRAINING_RESUME) == FREE.keys() | SCORING.keys() < set(FIELDS.known)


def train_one_trial(folder: Path) -> None:
    searcher, _ = make_searcher(make_study(folder), folder)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))


def test_a_study_resumes_after_a_change_that_does_not_affect_its_trials(tmp_path: Path) -> None:
    train_one_trial(tmp_path)
    for name, value in FREE.items():
        trial_store = TrialStore(changed(tmp_path, name, value), tmp_path)
        assert [trial.state.name for trial in trial_store.trials()] == ["COMPLETE"]
    assert trial_store.optuna_study.user_attrs["base"]["eval"]["batch_size"] == 32  # a fork resolves the trials from it
    for name, value in {**MEANT, **SCORING}.items():
        with pytest.raises(ConfigError, match=f"base.{name} was"):
            TrialStore(changed(tmp_path, name, value), tmp_path)


def test_a_fork_transfers_trials_that_differ_only_in_changeable_fields(tmp_path: Path) -> None:
    train_one_trial(tmp_path)
    for name, value in FREE.items():
        if name.startswith("data.") and name != "data.on_error":
            continue  # no archive is there to compare with
        new = changed(tmp_path, name, value, f"fork-{name}")
        assert (
            transfer_trials(TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "study", new)).num_copied
            == 1
        )


@pytest.mark.parametrize("ends", [None, "failed", "left"])
def test_before_a_trial_was_trained_every_change_is_accepted(tmp_path: Path, ends: str | None) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=9), tmp_path)
    if ends:
        for name in "ab":
            searcher.suggest(name)
    if ends == "failed":
        for name in "ab":
            searcher._running[name].trial.set_user_attr("worker_s", 5.0)
            searcher.on_trial_complete(name, {"failed": "out of memory", "done": True})
        Budget(searcher._trial_store).write()
    space = {"masking.strategy": {"choice": ["identical", "disjoint"]}, "masking.ratio": {"choice": [0.25, 0.5]}}
    goals = {"val/recall_at_1": "maximize", "cost/params": "minimize"}
    other = make_study(tmp_path, space, objectives=goals, num_trials=3)
    again, _ = make_searcher(other, tmp_path)
    suggestions = [again.suggest(name) for name in "abc"]
    first = 2 if ends else 0
    assert [s["number"] for s in suggestions if isinstance(s, dict)] == [first, first + 1, first + 2]
    trial_store = TrialStore(other, tmp_path)
    assert [direction.name for direction in trial_store.optuna_study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert len(trial_store.trials()) == 3 and trial_store.optuna_study.user_attrs["base"] == other.base
    if ends == "failed":
        assert trial_store.all_trials()[0].user_attrs["reason"] == "out of memory"
        assert Budget(trial_store).hours >= 10 / 3600 and trial_store.optuna_study.user_attrs["elapsed_s"] > 0


def test_a_trial_with_a_checkpoint_was_trained(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    suggestion = searcher.suggest("a")
    assert isinstance(suggestion, dict)
    Path(suggestion["run_dir"]).mkdir(parents=True)
    (Path(suggestion["run_dir"]) / "checkpoint.pt").touch()
    with pytest.raises(ConfigError, match="was started with a different definition"):
        TrialStore(changed(tmp_path, "optim.lr", 1e-2), tmp_path)


def test_trials_are_transferred_again_after_the_definition_changes(tmp_path: Path) -> None:
    train_one_trial(tmp_path)
    new = load_study(write(tmp_path, SPACE), "new")
    transfer_trials(TrialStore(new, tmp_path), load_source_study(tmp_path / DATABASE, "study", new))
    wider = {**SPACE, "masking.ratio": {"float": [0.2, 0.9]}}
    trial_store = TrialStore(load_study(write(tmp_path, wider), "new"), tmp_path)
    assert trial_store.sources == ["study"]
    assert (
        transfer_trials(trial_store, load_source_study(tmp_path / DATABASE, "study", trial_store.study)).num_copied == 1
    )
    assert TrialStore(trial_store.study, tmp_path).sources == []


def without(content: dict[str, Any], name: str) -> dict[str, Any]:
    section, field = name.split(".")
    return {**content, section: {key: value for key, value in content[section].items() if key != field}}


def test_a_field_that_a_later_version_adds_has_its_default_in_old_studies(tmp_path: Path) -> None:
    train_one_trial(tmp_path)
    study = make_study(tmp_path)
    definition = TrialStore(study, tmp_path).optuna_study.user_attrs["definition"]
    older = {**definition, "base": without(without(definition["base"], "loss.norm_pix"), "optim.betas")}
    TrialStore(study, tmp_path).optuna_study.set_user_attr("definition", older)
    assert len(TrialStore(study, tmp_path).trials()) == 1
    TrialStore(study, tmp_path).optuna_study.set_user_attr("definition", older)
    with pytest.raises(ConfigError, match=r"base\.loss\.norm_pix was False, is True"):
        TrialStore(changed(tmp_path, "loss.norm_pix", "true"), tmp_path)


def test_a_setting_that_a_later_version_adds_has_its_default_in_old_studies(tmp_path: Path) -> None:
    train_one_trial(tmp_path)
    study = make_study(tmp_path)
    definition = TrialStore(study, tmp_path).optuna_study.user_attrs["definition"]
    older = {**definition, "search": {"objectives": definition["search"]["objectives"]}}
    assert list(differences(older, study.definition())) == []
    limited = make_study(tmp_path, constraints={"time/epoch_s": "<= 10"})
    assert list(differences(older, limited.definition())) == ["search.constraints.time/epoch_s was not there, is <= 10"]


def test_a_training_resumes_after_a_change_that_does_not_affect_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_config(), TrainingProgress(2), {})
    for name, value in {**FREE, **SCORING}.items():
        assert load_checkpoint(tmp_path, small_config(**{name.replace(".", "__"): value}), {}).epochs == 2
    for name, value in MEANT.items():
        with pytest.raises(CheckpointError, match=f"was written with {name}"):
            load_checkpoint(tmp_path, small_config(**{name.replace(".", "__"): value}), {})


def test_a_buckets_trial_keeps_its_files_after_such_a_change() -> None:
    fingerprint = config_fingerprint(small_config().model_dump(mode="json"))
    for name, value in {**FREE, **SCORING}.items():
        assert (
            config_fingerprint(small_config(**{name.replace(".", "__"): value}).model_dump(mode="json")) == fingerprint
        )
    assert config_fingerprint(without(small_config().model_dump(mode="json"), "loss.norm_pix")) == fingerprint
    assert config_fingerprint(small_config(optim__lr=1e-2).model_dump(mode="json")) != fingerprint
