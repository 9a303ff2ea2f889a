"""The ledger (a real Optuna study in SQLite), the searcher in front of it, and the rules of early stopping."""

import math
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from optuna.trial import TrialState
from ray.tune.search import Searcher

from csmae.config import ConfigError
from csmae.tuning.events import Ended, Event, Reported, Started
from csmae.tuning.ledger import Ledger
from csmae.tuning.scheduler import Asha, Median
from csmae.tuning.searcher import LedgerSearcher, SpaceError
from csmae.tuning.study import Study, load_study
from test_study import write

SPACE = {"masking.ratio": {"float": [0.3, 0.9]}, "masking.strategy": {"choice": ["random", "disjoint"]}}


def make_study(folder: Path, space: dict[str, Any] | None = None, **search: Any) -> Study:
    folder.mkdir(exist_ok=True)
    return load_study(write(folder, space or SPACE, **{"num_trials": 3, **search}))


def make_searcher(study: Study, folder: Path) -> tuple[LedgerSearcher, list[Event]]:
    told: list[Event] = []
    return LedgerSearcher(Ledger(study, folder), folder / study.name, told.append), told


def result(epoch: int, value: float | None, **more: Any) -> dict[str, Any]:
    score = {} if value is None else {"metrics/val/f1_mean": value}
    return {"epoch": epoch, "metrics/train/loss": 1.0, **score, **more}


def test_the_base_is_the_first_trial_and_runs_to_its_end(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path), tmp_path)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(first, dict) and isinstance(second, dict)
    assert first["config"]["masking"] == {"ratio": 0.5, "strategy": "random", "reconstruction": "disjoint"}
    assert (first["start"], second["start"]) == (True, False)
    assert first["run_dir"] == str(tmp_path / "study" / "trials" / "0")


def test_outcomes_are_told_truthfully(tmp_path: Path) -> None:
    study = make_study(tmp_path, num_trials=6)
    searcher, told = make_searcher(study, tmp_path)
    for name in "abcdef":
        searcher.suggest(name)
    assert searcher.suggest("g") == Searcher.FINISHED
    searcher.on_trial_result("a", result(1, 0.2))
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    searcher.on_trial_complete("b", result(1, 0.1))
    searcher.on_trial_result("c", result(1, 0.3))
    searcher.on_trial_complete("c", {"failed": "the loss is not finite in epoch 2", "done": True})
    searcher.on_trial_complete("d", result(4, math.nan, finished=True))
    searcher.on_trial_complete("e", result(4, None, finished=True))
    searcher.on_trial_complete("f", error=True)
    trials = optuna.load_study(study_name="study", storage=f"sqlite:///{tmp_path}/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "FAIL", "FAIL"]
    assert trials[0].value == 0.4 and trials[0].intermediate_values == {1: 0.2, 4: 0.4}
    assert trials[1].intermediate_values == {1: 0.1}
    assert trials[2].intermediate_values == {1: 0.3}
    reasons = [trial.user_attrs.get("reason") for trial in trials]
    assert reasons[2] == "the loss is not finite in epoch 2"
    assert reasons[3] == "val/f1_mean was nan at the end"
    assert reasons[4] == "val/f1_mean was not reported"
    assert [event.state for event in told if isinstance(event, Ended)] == [t.state.name for t in trials]


def test_an_epoch_told_twice_is_written_once(tmp_path: Path) -> None:
    searcher, told = make_searcher(make_study(tmp_path), tmp_path)
    searcher.suggest("a")
    for epoch in (1, 2, 1, 2, 3):
        searcher.on_trial_result("a", result(epoch, epoch / 10))
    assert [event.epoch for event in told if isinstance(event, Reported)] == [1, 2, 3]


def test_a_study_goes_on_with_the_trials_that_a_dead_driver_left(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    searcher, _ = make_searcher(study, tmp_path)
    left = [searcher.suggest(name) for name in "ab"]
    searcher.on_trial_result("b", result(1, 0.3))
    again, told = make_searcher(study, tmp_path)
    assert [again.suggest(name) for name in "cd"] == left
    assert [event.resumed for event in told if isinstance(event, Started)] == [True, True]
    again.on_trial_result("d", result(1, 0.3))
    assert not [event for event in told if isinstance(event, Reported)]
    third = again.suggest("e")
    assert isinstance(third, dict) and third["number"] == 2
    assert again.suggest("f") == Searcher.FINISHED


def test_a_larger_number_of_trials_extends_a_study(tmp_path: Path) -> None:
    searcher, _ = make_searcher(make_study(tmp_path, num_trials=1), tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    assert searcher.suggest("b") == Searcher.FINISHED
    more, _ = make_searcher(make_study(tmp_path, num_trials=2), tmp_path)
    suggestion = more.suggest("b")
    assert isinstance(suggestion, dict) and suggestion["number"] == 1
    assert more.suggest("c") == Searcher.FINISHED


def test_a_changed_study_is_refused_with_the_difference(tmp_path: Path) -> None:
    Ledger(make_study(tmp_path), tmp_path)
    changed = make_study(tmp_path, {"masking.ratio": {"float": [0.3, 0.8]}})
    with pytest.raises(ConfigError, match="started otherwise") as caught:
        Ledger(changed, tmp_path)
    assert "space.masking.ratio was 0.3 to 0.9, is 0.3 to 0.8" in str(caught.value)
    assert "space.masking.strategy was random, disjoint, is not there" in str(caught.value)
    Ledger(make_study(tmp_path, sampler="random", num_trials=99), tmp_path)


def test_studies_of_different_names_share_a_database(tmp_path: Path) -> None:
    one = load_study(write(tmp_path, SPACE), "one")
    two = load_study(write(tmp_path, {"masking.ratio": {"float": [0.1, 0.2]}}), "two")
    Ledger(one, tmp_path).next()
    assert Ledger(two, tmp_path).trials() == []


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "studies.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(ConfigError, match=r"studies\.db: cannot be used"):
        Ledger(make_study(tmp_path), tmp_path)


def test_impossible_combinations_cost_no_trial(tmp_path: Path) -> None:
    space = {"model.embed_dim": {"choice": [96, 128]}, "model.num_heads": {"choice": [3, 4]}}
    base = {"model": {"size": "nano", "embed_dim": 96, "num_heads": 4}}
    study = load_study(write(tmp_path, space, base=base, num_trials=12, sampler="random"))
    searcher, _ = make_searcher(study, tmp_path)
    suggestions = [searcher.suggest(str(index)) for index in range(12)]
    pairs = {
        (s["config"]["model"]["embed_dim"], s["config"]["model"]["num_heads"])
        for s in suggestions
        if isinstance(s, dict)
    }
    assert pairs == {(96, 3), (96, 4), (128, 4)}
    assert searcher.suggest("more") == Searcher.FINISHED


def test_a_space_that_can_only_fail_ends_the_search(tmp_path: Path) -> None:
    base = {"train": {"epochs": 5}, "optim": {"warmup_epochs": 1}, "model": {"size": "nano"}}
    space = {"train.epochs": {"int": [2, 5]}, "optim.warmup_epochs": {"int": [1, 4]}}
    study = load_study(write(tmp_path, space, base=base, num_trials=500, sampler="random", start_from=[]))
    impossible = Study(study.name, {**base, "train": {"epochs": 0}}, study.space, study.search)
    ledger = Ledger(study, tmp_path)
    ledger.study = Study(study.name, {"model": {"patch_size": 7}}, impossible.space, study.search)
    with pytest.raises(SpaceError, match="next to no valid configuration"):
        LedgerSearcher(ledger, tmp_path, lambda event: None).suggest("a")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "nsga2"])
def test_every_sampler_proposes_and_learns(tmp_path: Path, sampler: str) -> None:
    study = make_study(tmp_path, sampler=sampler, num_trials=8, startup_trials=2)
    searcher, _ = make_searcher(study, tmp_path)
    for index in range(8):
        suggestion = searcher.suggest(str(index))
        assert isinstance(suggestion, dict)
        value = 1 - abs(suggestion["config"]["masking"]["ratio"] - 0.7)
        searcher.on_trial_complete(str(index), result(4, value, finished=True))
    best = Ledger(study, tmp_path).best()[0]
    assert best.state is TrialState.COMPLETE and best.value is not None and best.value > 0.8


def test_a_database_may_be_copied_and_goes_on(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    searcher, _ = make_searcher(study, tmp_path)
    first = searcher.suggest("a")
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(tmp_path / "studies.db", other)
    again, _ = make_searcher(study, other)
    suggestion = again.suggest("a")
    assert isinstance(first, dict) and isinstance(suggestion, dict) and suggestion["config"] == first["config"]


# Early stopping


def test_asha_keeps_the_best_third_at_each_rung() -> None:
    asha = Asha(grace_epochs=1, reduction=3)
    scores = np.random.default_rng(0).permutation(300) / 300
    kept = [float(score) for number, score in enumerate(scores) if asha.keeps(number, 1, float(score))]
    assert 90 <= len(kept) <= 130
    assert set(np.sort(scores)[-80:]) <= set(kept)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_asha_never_stops_the_best_so_far_and_judges_once_a_rung(scores: list[float], reduction: int) -> None:
    asha = Asha(2, reduction)
    for number, score in enumerate(scores):
        assert asha.keeps(number, 1, score)
        kept = asha.keeps(number, 2, score)
        assert kept or score < max(scores[:number])
        assert asha.keeps(number, 3, 0.0) or reduction == 1


def test_asha_judges_at_the_rungs_and_an_epoch_late_where_a_score_is_missing() -> None:
    asha = Asha(1, 3)
    asha.keeps(0, 1, 0.9)
    asha.keeps(0, 3, 0.9)
    assert not asha.keeps(1, 1, 0.1)
    assert not asha.keeps(2, 4, 0.1)


def test_hyperband_gives_each_bracket_its_own_grace() -> None:
    rule = Asha(1, 3, num_brackets=3)
    for number in range(3):
        rule.keeps(number, 1, 0.9)
        rule.keeps(number, 3, 0.9)
    assert [rule.keeps(number, 1, 0.1) for number in (3, 4, 5)] == [False, True, True]
    assert [rule.keeps(number, 3, 0.1) for number in (4, 5)] == [False, True]


def test_median_stops_below_the_median_of_means_and_not_before_its_grace() -> None:
    median = Median(grace_epochs=2)
    for number, score in enumerate((0.5, 0.6, 0.7)):
        for epoch in (1, 2, 3):
            assert median.keeps(number, epoch, score)
    assert median.keeps(3, 1, 0.1)
    assert not median.keeps(3, 2, 0.1)
    assert median.keeps(4, 2, 0.65)


def test_a_refilled_rule_decides_as_one_that_saw_everything(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    curves = [generator.random(9).tolist() for _ in range(20)]
    study = make_study(tmp_path, num_trials=40)
    ledger, seen, told = Ledger(study, tmp_path), Asha(1, 3), Asha(1, 3)
    for curve in curves:
        trial = ledger.next()
        study.space.suggest(trial)
        for epoch, score in enumerate(curve, start=1):
            ledger.report(trial, epoch, score)
            if not seen.keeps(trial.number, epoch, score):
                ledger.prune(trial)
                break
    for number, seen_curve in Ledger(study, tmp_path).curves():
        for epoch, value in seen_curve.items():
            told.keeps(number, epoch, value)
    decisions = [
        (rule.keeps(99, 1, score), rule.keeps(98, 3, score)) for score in (0.2, 0.5, 0.9) for rule in (seen, told)
    ]
    assert decisions[::2] == decisions[1::2]
