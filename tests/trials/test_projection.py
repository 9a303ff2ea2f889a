"""The best configurations of another study become points of this one's space, whatever space and archive they come from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from csmae.cli.explore import _open_trial_store
from csmae.config import ConfigError
from csmae.settings import merge, parse_config
from csmae.storage.layout import DATABASE
from csmae.study.study import Study, load_study
from csmae.trials.attributes import PROJECTED_FROM
from csmae.trials.leaderboard import leaderboard
from csmae.trials.projection import Similarity, compare_data, project
from csmae.trials.store import TrialStore
from csmae.trials.transfer import Transferred, describe_transfer, load_source_study, transfer_trials
from csmae.trials.trial import params_of
from tests.study.test_study import BASE, write
from tests.support.archives import write_v2
from tests.tuning.test_searcher import make_searcher, result

pytestmark = pytest.mark.usefixtures("copied_database")

OLD_SPACE = {"optim.lr": {"float": [1e-5, 1e-2], "log": True}, "masking.ratio": {"float": [0.1, 0.95]}}

OLD_POINTS = [{"optim.lr": 1e-3, "masking.ratio": ratio} for ratio in (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)]


def make(folder: Path, name: str, space: dict[str, Any], base: dict[str, Any] | None = None, **search: Any) -> Study:
    return load_study(write(folder, space, base=base, **{"sampler": "random", "strategy": "none", **search}), name)


def old_study(folder: Path, base: dict[str, Any] | None = None, **search: Any) -> Study:
    """A study of seven trials whose score is their masking ratio."""
    study = make(folder, "old", OLD_SPACE, base, start_from=OLD_POINTS, num_trials=7, **search)
    searcher, _ = make_searcher(study, folder)
    for index in range(7):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        score = suggestion["config"]["masking"]["ratio"]
        searcher.on_trial_complete(str(index), result(4, score, finished=True) | {"metrics/cost/params": 1e6 * score})
    return study


def transfer(folder: Path, study: Study, source: str = "old") -> tuple[TrialStore, Transferred]:
    trial_store = TrialStore(study, folder)
    return trial_store, transfer_trials(trial_store, load_source_study(folder / DATABASE, source, study))


def enqueued(trial_store: TrialStore) -> list[tuple[list[Any], dict[str, Any]]]:
    """Origin and point of the projected configurations, in the order in which they will be trained."""
    projected = [trial for trial in trial_store.all_trials() if PROJECTED_FROM in trial.user_attrs]
    return [(trial.user_attrs[PROJECTED_FROM], dict(trial.system_attrs["fixed_params"])) for trial in projected]


@pytest.mark.parametrize(
    ("domain", "value", "nearest"),
    [
        ({"float": [0.3, 0.9]}, 0.95, 0.9),
        ({"float": [0.3, 0.9]}, 0.1, 0.3),
        ({"float": [0.3, 0.9]}, 0.42, 0.42),
        ({"float": [0.3, 0.9], "step": 0.1}, 0.4321, 0.4),
        ({"float": [0.3, 0.9], "step": 0.1}, 0.95, 0.9),
        ({"choice": [0.25, 0.5, 0.75]}, 0.6, 0.5),
        ({"choice": [0.25, 0.75]}, 0.95, 0.75),
    ],
)
def test_a_number_outside_its_domain_takes_the_nearest_value(
    tmp_path: Path, domain: dict[str, Any], value: float, nearest: float
) -> None:
    study = make(tmp_path, "new", {"masking.ratio": domain})
    config = parse_config(merge(BASE, {"masking.ratio": value}), "")
    assert project(config, study) == {"masking.ratio": nearest}


def test_whole_numbers_words_and_lists_are_projected(tmp_path: Path) -> None:
    space = {
        "model.decoder_depth": {"int": [2, 8], "step": 3},
        "masking.strategy": {"choice": ["identical", "disjoint"]},
        "optim.betas": {"choice": [[0.9, 0.99], [0.8, 0.95]]},
        "loss.norm_pix": {"choice": [True, False]},
    }
    study = make(tmp_path, "new", space)
    values = {
        "model.decoder_depth": 7,
        "masking.strategy": "random",
        "optim.betas": [0.8, 0.95],
        "loss.norm_pix": False,
    }
    point = project(parse_config(merge(BASE, values), ""), study)
    assert (
        point
        == {
            "model.decoder_depth": 8,
            "masking.strategy": "identical",  # neither the source's value nor the base's belongs to the domain: its first one
            "optim.betas": [0.8, 0.95],
            "loss.norm_pix": False,
        }
    )


def test_only_fields_whose_condition_holds_are_projected(tmp_path: Path) -> None:
    space = {
        "loss.mim_weight": {"choice": [0.0, 1.0]},
        "loss.temperature": {"float": [0.1, 1.0], "when": {"loss.mim_weight": "> 0"}},
    }
    study = make(tmp_path, "new", space)
    config = parse_config(merge(BASE, {"loss.mim_weight": 0.2, "loss.temperature": 0.3}), "")
    assert project(config, study) == {"loss.mim_weight": 0.0}
    config = parse_config(merge(BASE, {"loss.mim_weight": 0.8, "loss.temperature": 3.0}), "")
    assert project(config, study) == {"loss.mim_weight": 1.0, "loss.temperature": 1.0}


def test_the_best_configurations_that_cannot_be_copied_are_trained_first_and_may_be_stopped(tmp_path: Path) -> None:
    old_study(tmp_path)
    space = {"optim.lr": {"float": [1e-5, 1e-2], "log": True}, "masking.ratio": {"float": [0.3, 0.7]}}
    new = make(tmp_path, "new", space, num_trials=4, strategy="asha")
    trial_store, transferred = transfer(tmp_path, new)
    assert transferred == Transferred(num_copied=4, num_enqueued=1)  # four of the five best were copied
    assert enqueued(trial_store) == [(["old", 6], {"optim.lr": 1e-3, "masking.ratio": 0.7})]
    searcher, _ = make_searcher(new, tmp_path)
    base, first = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(base, dict) and isinstance(first, dict)
    assert (base["never_stop"], first["never_stop"]) == (True, False)
    assert first["config"]["masking"]["ratio"] == 0.7 and first["config"]["optim"]["lr"] == 1e-3


def test_best_configurations_are_enqueued_once_in_the_order_of_the_leaderboard(tmp_path: Path) -> None:
    old_study(tmp_path)
    new = make(
        tmp_path, "new", {"masking.ratio": {"float": [0.1, 0.95], "step": 0.05}, "loss.mim_weight": {"choice": [0.5]}}
    )
    trial_store, transferred = transfer(tmp_path, new)
    assert transferred == Transferred(0, 5)
    ratios = [point["masking.ratio"] for _, point in enqueued(trial_store)]
    assert ratios == pytest.approx([0.75, 0.65, 0.55, 0.45, 0.35])
    again, transferred = transfer(tmp_path, new)
    assert transferred == Transferred(0, 0) and len(enqueued(again)) == 5


def test_points_that_meet_in_a_smaller_space_are_enqueued_once_and_those_with_too_high_costs_not(
    tmp_path: Path,
) -> None:
    old_study(tmp_path)
    space = {"masking.ratio": {"float": [0.1, 0.6]}, "loss.mim_weight": {"choice": [0.5]}}
    trial_store, transferred = transfer(tmp_path, make(tmp_path, "new", space))
    assert transferred.num_enqueued == 4
    assert [point["masking.ratio"] for _, point in enqueued(trial_store)] == [0.6, 0.55, 0.45, 0.35]
    cheap = make(tmp_path, "cheap", space, constraints={"cost/params": "<= 10"})
    assert transfer(tmp_path, cheap)[1] == Transferred(0, 0)


def test_a_projected_configuration_that_is_invalid_here_is_left_out(tmp_path: Path) -> None:
    heads, starts = {"choice": [3, 8]}, [{"model.embed_dim": 192, "model.num_heads": 8}, {"model.embed_dim": 96}]
    space = {"model.embed_dim": {"choice": [96, 192]}, "model.num_heads": heads}
    old = make(tmp_path, "old", space, start_from=starts, num_trials=2)
    searcher, _ = make_searcher(old, tmp_path)
    for index, score in enumerate((0.5, 0.4)):
        searcher.suggest(str(index))
        searcher.on_trial_complete(str(index), result(4, score, finished=True))
    smaller = {"model.embed_dim": {"choice": [96, 180]}, "model.num_heads": heads}
    new = make(tmp_path, "new", smaller, start_from=[])
    trial_store, transferred = transfer(tmp_path, new)
    assert transferred == Transferred(1, 0)  # 8 heads do not divide 180
    assert enqueued(trial_store) == []


# Objectives


def test_a_study_that_shares_the_first_objective_gives_its_best_by_that_objective(tmp_path: Path) -> None:
    old_study(tmp_path, objectives={"val/f1_mean": "maximize", "cost/params": "minimize"})
    new = make(tmp_path, "new", OLD_SPACE)
    trial_store, transferred = transfer(tmp_path, new)
    assert transferred == Transferred(0, 5)
    assert [point["masking.ratio"] for _, point in enqueued(trial_store)] == [0.75, 0.65, 0.55, 0.45, 0.35]
    source = load_source_study(tmp_path / DATABASE, "old", new)
    assert describe_transfer(source, new, transferred) == (
        "study old: no trial is copied, because it had other objectives; 5 of its best configurations become starting points"
    )


@pytest.mark.parametrize("goals", [{"val/recall_at_1": "maximize"}, {"val/f1_mean": "minimize"}])
def test_a_study_with_another_first_objective_gives_nothing(tmp_path: Path, goals: dict[str, str]) -> None:
    old_study(tmp_path)
    new = make(tmp_path, "new", OLD_SPACE, objectives=goals)
    with pytest.raises(
        ConfigError, match=r"study 'old' had another first objective, 'maximize val/f1_mean' instead of"
    ) as e:
        transfer(tmp_path, new)
    assert len(str(e.value).splitlines()) == 1


# Archives


def test_the_more_similar_the_archive_the_more_configurations_are_projected(tmp_path: Path) -> None:
    old_study(tmp_path)
    other_scenes = {**BASE, "data": {"synthetic": {"num_train": 256}}}
    trial_store, transferred = transfer(tmp_path, make(tmp_path, "scenes", OLD_SPACE, other_scenes))
    assert transferred == Transferred(0, 3)
    assert [point["masking.ratio"] for _, point in enqueued(trial_store)] == [0.75, 0.65, 0.55]
    archive = write_v2(tmp_path / "v2")
    other_kind = make(tmp_path, "kind", OLD_SPACE, {**BASE, "data": {"path": str(archive)}})
    trial_store, transferred = transfer(tmp_path, other_kind)
    assert transferred == Transferred(0, 1)
    assert [point["masking.ratio"] for _, point in enqueued(trial_store)] == [0.75]
    source = load_source_study(tmp_path / DATABASE, "old", other_kind)
    assert "because it had another archive, synthetic; 1 of" in describe_transfer(source, other_kind, transferred)


def test_archives_are_the_same_by_their_content_and_similar_by_their_version(tmp_path: Path) -> None:
    first, copy = write_v2(tmp_path / "first"), write_v2(tmp_path / "copy")
    old_study(tmp_path, {**BASE, "data": {"path": str(first)}})

    def similarity(**data: Any) -> Similarity:
        new = make(tmp_path, "new", OLD_SPACE, {**BASE, "data": data})
        return compare_data(load_source_study(tmp_path / DATABASE, "old", new), new)

    assert similarity(path=str(first)) is Similarity.SAME
    assert similarity(path=str(copy)) is Similarity.SAME
    assert similarity(path=str(copy), max_train_pairs=2) is Similarity.KIND
    assert similarity(path=str(first), max_train_pairs=2) is Similarity.SAME
    assert similarity(path=str(tmp_path / "gone")) is Similarity.OTHER
    assert similarity(path="synthetic") is Similarity.OTHER


# Resumed studies


def test_best_configurations_are_transferred_again_after_the_definition_changes(tmp_path: Path) -> None:
    old_study(tmp_path)
    space = {"masking.ratio": {"float": [0.1, 0.95]}, "loss.mim_weight": {"choice": [0.5]}}
    transfer(tmp_path, make(tmp_path, "new", space))
    changed = make(tmp_path, "new", {**space, "masking.ratio": {"float": [0.1, 0.5]}})
    assert TrialStore(changed, tmp_path).sources == ["old"]
    trial_store, transferred = transfer(tmp_path, changed)
    ratios = [point["masking.ratio"] for _, point in enqueued(trial_store)]
    assert ratios == [0.45, 0.35] and transferred.num_enqueued == 2  # the better ones become 0.5, which is the base
    assert trial_store.sources == []


def test_sources_with_a_similar_archive_come_first_and_each_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_scenes = {**BASE, "data": {"synthetic": {"num_train": 256}}}
    old_study(tmp_path)
    far = make(tmp_path, "far", OLD_SPACE, other_scenes, start_from=[{"masking.ratio": 0.2}], num_trials=1)
    searcher, _ = make_searcher(far, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.9, finished=True))
    space = {"masking.ratio": {"float": [0.3, 0.95]}, "optim.lr": {"choice": [1e-3]}}
    trial_store = _open_trial_store(make(tmp_path, "new", space), tmp_path, None, ["far", "old"])
    assert capsys.readouterr().out.splitlines() == [
        "study old: 5 trials copied; 0 of its best configurations become starting points",
        "study far: no trial is copied, because it had another archive, synthetic; "
        "1 of its best configurations become starting points",
    ]
    assert [origin for origin, _ in enqueued(trial_store)] == [["far", 0]]


def test_a_projected_trial_can_become_the_champion(tmp_path: Path) -> None:
    old_study(tmp_path)
    new = make(tmp_path, "new", {"masking.ratio": {"float": [0.1, 0.7]}}, num_trials=1, start_from=[])
    transfer(tmp_path, new)
    searcher, _ = make_searcher(new, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.8, finished=True))
    trial_store = TrialStore(new, tmp_path)
    (entry,) = leaderboard(trial_store.optuna_study).entries
    assert math.isclose(entry.mean, 0.8) and params_of(entry.trial) == {"masking.ratio": 0.7}
    assert len(trial_store.explored()) == 1
