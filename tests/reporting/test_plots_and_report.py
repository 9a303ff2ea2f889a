"""Pictures and reports show what they are given: colours, frames, curves, tables."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from csmae.cli.main import main
from csmae.reporting.colors import HIDDEN, channels, paint, stretch_of
from csmae.reporting.panels import draw_trial
from csmae.reporting.plots import (
    GREEN,
    RED,
    Reconstruction,
    direction_picture,
    loss_picture,
    reconstruction_picture,
    retrieval_picture,
    save_png,
)
from csmae.reporting.record import StudyRecord, Trial, read_record
from csmae.reporting.report import markdown, write_report
from csmae.reporting.study_plots import budget_picture, history_picture, parallel_picture, scale_of, study_pictures
from csmae.retrieval.panel import Retrieval
from csmae.sensors import DIRECTIONS
from csmae.tracking.outbox import Event, Outbox
from csmae.tracking.provenance import provenance
from csmae.trial_status import TrialStatus


def scene(seed: int, bands: int) -> Any:
    return np.random.default_rng(seed).normal(500, 100, (bands, 24, 24)).astype(np.float32)


def study(values: list[float], direction: str = "maximize", **params: list[Any]) -> StudyRecord:
    record = StudyRecord("masking", objective="val/f1_mean", direction=direction)
    for number, value in enumerate(values):
        state = "COMPLETE" if math.isfinite(value) else "FAIL"
        point = {name.replace("__", "."): column[number] for name, column in params.items()}
        curves = {"val/f1_mean": {1: value / 2, 2: value}, "time/epoch_s": {1: 1.0, 2: 2.0}}
        record.trials[number] = Trial(number, point, number, number + 1, state, None, curves)
    return record


def test_natural_colour_is_b04_b03_b02_and_false_colour_vv_vh_and_their_difference() -> None:
    s2 = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((10, 2, 2), np.float32)
    s1 = np.stack([np.full((2, 2), -18.0), np.full((2, 2), -11.0)]).astype(np.float32)
    assert channels(s2)[0, 0].tolist() == [2, 1, 0]
    assert channels(s1)[0, 0].tolist() == [-11, -18, 7]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sampled_from([2, 10]), st.floats(-30, 3000), st.floats(0, 1000))
def test_any_scene_is_painted_within_the_range_of_colours(seed: int, bands: int, mean: float, spread: float) -> None:
    image = (np.random.default_rng(seed).normal(mean, spread, (bands, 8, 8))).astype(np.float32)
    picture = paint(image)
    assert picture.shape == (8, 8, 3)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_hidden_pixels_are_grey_and_the_others_as_they_were() -> None:
    image, visible = scene(0, 10), np.zeros((24, 24), bool)
    visible[:12] = True
    picture = paint(image, stretch_of(image), visible)
    assert np.all(picture[12:] == np.float32(HIDDEN))
    assert np.array_equal(picture[:12], paint(image)[:12])


def test_a_reconstruction_is_shown_with_the_stretch_of_its_original() -> None:
    original = scene(0, 2)
    row = Reconstruction("s1", original, np.ones((24, 24), bool), original + 50, original)
    axes = reconstruction_picture([row], "t").axes
    pictures = [np.asarray(ax.images[0].get_array()) for ax in axes]
    assert np.array_equal(pictures[0], pictures[3])
    assert pictures[2][..., 0].mean() > pictures[0][..., 0].mean()


def test_hits_with_shared_labels_are_framed_green_the_others_red() -> None:
    shared = [True, False, True]
    panels = [Retrieval(d, scene(0, 2), [scene(i, 10) for i in range(3)], shared, ["Pastures"]) for d in DIRECTIONS]
    figure = retrieval_picture(panels, "Trial 3")
    frames = [axes.spines["left"].get_edgecolor()[:3] for axes in figure.axes[1:4]]
    assert frames == [to_rgb(GREEN), to_rgb(RED), to_rgb(GREEN)]
    assert [figure.axes[row * 4].get_ylabel() for row in range(4)] == ["S1 → S1", "S1 → S2", "S2 → S1", "S2 → S2"]
    assert "Pastures" in figure.get_suptitle()


def test_each_loss_term_that_was_computed_has_a_panel_of_its_own() -> None:
    curves = {"train/loss": {1: 3.0, 2: 2.0}, "train/mim": {1: 1.0, 2: 0.5}, "train/lr": {1: 0.1}}
    axes = [ax for ax in loss_picture(curves, "t").axes if ax.lines]
    assert [ax.get_title() for ax in axes] == ["total  (loss)", "mutual information  (mim)"]
    assert np.asarray(axes[1].lines[0].get_ydata()).tolist() == [1.0, 0.5]


def test_the_four_directions_and_their_mean_are_lines_of_one_picture() -> None:
    curves = {f"val/f1/{direction}": {1: 0.1, 2: 0.2} for direction in DIRECTIONS} | {"val/f1_mean": {1: 0.3, 2: 0.4}}
    lines = direction_picture(curves, "t").axes[0].lines
    assert [line.get_label() for line in lines] == ["S1 → S1", "S1 → S2", "S2 → S1", "S2 → S2", "mean"]


@pytest.mark.parametrize(
    ("direction", "best"), [("maximize", [0.3, 0.3, 0.5, 0.5]), ("minimize", [0.3, 0.2, 0.2, 0.2])]
)
def test_the_best_so_far_never_gets_worse(direction: str, best: list[float]) -> None:
    record = study([0.3, 0.2, 0.5, math.nan], direction)
    line = next(line for line in history_picture(record).axes[0].lines if line.get_label() == "best so far")
    assert np.asarray(line.get_ydata()).tolist() == best


def test_the_budget_counts_the_epochs_of_failed_trials_too() -> None:
    line = budget_picture(study([0.3, math.nan, 0.5])).axes[0].lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [2, 6, 6]


def test_an_axis_is_logarithmic_where_the_space_is() -> None:
    record = study([0.1, 0.2], optim__lr=[1e-3, 2e-3], loss__mim_weight=[0.001, 4.0])
    record.params = {"space.optim.lr": "float 0.0001 to 0.005, log", "space.loss.mim_weight": "float 0 to 4"}
    assert [scale_of(record, name).log for name in record.explored()] == [True, False]


def test_choices_over_more_than_a_magnitude_get_a_logarithmic_axis() -> None:
    record = study(
        [0.1, 0.2], optim__lr=[1e-4, 5e-3], masking__ratio=[0.2, 0.8], masking__strategy=["random", "disjoint"]
    )
    assert [scale_of(record, name).log for name in record.explored()] == [True, False, False]
    assert scale_of(record, "masking.strategy").ticks == {0.0: "disjoint", 1.0: "random"}


def test_choices_of_lists_have_a_place_each() -> None:
    record = study([0.1, 0.2, 0.3], optim__betas=[[0.9, 0.95], [0.9, 0.999], [0.9, 0.95]])
    scale = scale_of(record, "optim.betas")
    assert [scale.position(trial.params["optim.betas"]) for trial in record.trials.values()] == [0.0, 1.0, 0.0]
    assert "[0.9, 0.95]" in markdown(record)


def test_a_trial_without_a_conditional_parameter_has_a_gap_in_its_line() -> None:
    record = study([0.1, 0.2], loss__mim_weight=[0.0, 1.0])
    record.trials[1].params["loss.temperature"] = 0.5
    record.trials[0].params["optim.lr"] = 1e-3
    lines = parallel_picture(record).axes[0].lines[:2]
    assert any(np.isnan(np.asarray(line.get_ydata(), float)).any() for line in lines)


def test_every_picture_of_a_study_is_drawn_even_of_one_trial(tmp_path: Path) -> None:
    one = {name for name, _ in study_pictures(study([0.3], masking__ratio=[0.5]))}
    assert one == {"history", "budget", "time"}
    record = study([0.3, 0.4], masking__ratio=[0.5, 0.6], loss__norm_pix=[True, False])
    record.summary["importance/masking.ratio"] = 1.0
    for name, figure in study_pictures(record):
        assert imread(save_png(figure, tmp_path / f"{name}.png")).shape[2] == 4
    assert len(list(tmp_path.iterdir())) == 6
    assert list(study_pictures(study([math.nan]))) == []
    record.trials[0].state = record.trials[1].state = TrialStatus.PRUNED
    assert len(list(study_pictures(record))) == 6


def training_arrays(path: Path) -> None:
    """What a training run leaves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = {"s1": 2, "s2": 10}
    arrays: dict[str, Any] = {"labels": np.array(["Pastures"])}
    for target, count in bands.items():
        arrays[target] = np.stack([scene(place, count) for place in range(5)])
        arrays[f"{target}_visible"] = np.ones((5, 24, 24), bool)
        arrays[f"query_{target}"] = scene(9, count)
        for source in bands:
            arrays[f"{source}_to_{target}"] = arrays[target]
            arrays[f"hits_{source}_to_{target}"] = arrays[target]
            arrays[f"shared_{source}_to_{target}"] = np.array([True, False, True, True, False])
    np.savez(path, **arrays)


def test_a_trial_is_drawn_at_the_start_the_middle_and_the_end(tmp_path: Path) -> None:
    for epoch in (1, 3, 5, 7, 9):
        training_arrays(tmp_path / "arrays" / f"epoch-{epoch:04}.npz")
    pictures = draw_trial(study([0.3]).trials[0], tmp_path)
    kinds = ("reconstructions", "retrieval")
    drawn = {f"epoch-{epoch:04}-{kind}.png" for epoch in (1, 5, 9) for kind in kinds}
    assert {path.name for path in pictures.iterdir()} == drawn | {"losses.png", "f1.png"}


def test_a_study_says_from_which_program_it_comes() -> None:
    tags = provenance()
    assert f"numpy {np.__version__}" in tags["csmae.versions"]
    assert tags["csmae.command"].startswith("python ")
    if "csmae.git_commit" in tags:
        assert re.fullmatch(r"[0-9a-f]{40}( with changes)?", tags["csmae.git_commit"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An outbox as a search leaves it."""
    outbox = Outbox(tmp_path / "masking" / "outbox.jsonl")

    def add(kind: str, number: int | None, **body: Any) -> None:
        outbox.append(Event(kind, number, 1_000, body))

    tags = {"csmae.command": "python search.py spaces/masking.yaml", "csmae.git_commit": "abc123"}
    add("start", None, params={"data.path": "<b>&"}, tags=tags, primary_metric="val/f1_mean", direction="maximize")
    for number, ratio in enumerate((0.3, 0.6, 0.7)):
        add("trial", number, params={"masking.ratio": ratio})
        for epoch in (1, 2):
            metrics = {"val/f1_mean": ratio * epoch / 2, "train/loss": 1 / epoch}
            add("epoch", number, epoch=epoch, metrics=metrics)
    spent = {"step": 2, "metrics": {"budget/epochs": 2.0}}
    add("end", 0, state="COMPLETE", reason=None, **spent)
    add("end", 1, state="COMPLETE", reason=None, **spent)
    add("end", 2, state="FAIL", reason="train/loss is nan", **spent)
    summary = {"scores/champion/test/f1_mean": 0.61, "scores/untrained encoder/test/f1_mean": 0.25}
    add("finish", None, step=1, metrics=summary | {"importance/masking.ratio": 1.0})
    outbox.close()
    return tmp_path / "masking"


def test_a_record_holds_what_the_outbox_says(folder: Path) -> None:
    record = read_record(folder)
    assert [trial.number for trial in record.ranked()] == [1, 0]
    assert record.trials[2].reason == "train/loss is nan"
    assert record.trials[1].curves["train/loss"] == {1: 1.0, 2: 0.5}
    assert record.explored() == ["masking.ratio"]


def test_what_is_kept_of_a_trial_later_does_not_lengthen_it(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.jsonl")
    outbox.append(Event("trial", 0, 1_000, {"params": {}}))
    outbox.append(Event("end", 0, 2_000, {"state": "COMPLETE", "reason": None, "step": 1, "metrics": {}}))
    outbox.append(Event("artifact", 0, 9_000, {"path": "/", "artifact_path": ""}))
    outbox.close()
    assert read_record(tmp_path).trials[0].seconds == 1


def test_the_report_is_one_page_that_needs_nothing_else(folder: Path) -> None:
    page, summary, *pictures = write_report(folder)
    text = page.read_text()
    assert len(pictures) == 6
    assert text.count("data:image/png;base64,") == 8
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "&lt;b&gt;&amp;" in text
    assert "<b>&" not in text
    for fact in (
        "trial 1: val/f1_mean 0.6",
        "train/loss is nan",
        "python search.py spaces/masking.yaml",
        "arXiv 2401.07782",
    ):
        assert fact in text
        assert fact in summary.read_text()


def test_the_summary_ranks_the_trials_and_shows_the_protocol_scores(folder: Path) -> None:
    text = markdown(read_record(folder))
    assert text.index("| 1 | trained to the end | 0.6 |") < text.index("| 0 | trained to the end | 0.3 |")
    assert "| champion | f1 | 0.61 | – |" in text
    assert "| masking.ratio | 100% |" in text


def test_the_report_command_names_the_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "masking", "--storage", str(folder.parent)]) == 0
    assert capsys.readouterr().out == f"{folder}/report.html and {folder}/report.md\n"


def test_the_sync_command_brings_a_study_to_a_database(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sync", "masking", "--storage", str(folder.parent))
    assert main([*words, "--mlflow-uri", f"sqlite:///{folder}/mlflow.db"]) == 0
    assert capsys.readouterr().out == f"masking is complete in sqlite:///{folder}/mlflow.db\n"
    assert main([*words, "--mlflow-uri", "http://127.0.0.1:9", "--timeout", "1"]) == 1
    assert capsys.readouterr().out == "14 events of masking are not uploaded yet to http://127.0.0.1:9\n"


@pytest.mark.parametrize("name", ["sync", "report"])
def test_a_study_that_is_not_there_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "nothing", "--storage", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "no study: there is no outbox.jsonl in it" in line and line.count("\n") == 1
