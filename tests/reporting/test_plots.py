"""Plots show what they are given: colors, frames, curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from csmae.reporting.colors import HIDDEN_GRAY, render, rgb_channels, stretch_of
from csmae.reporting.parameter_plots import explored, parallel_figure, scale_of
from csmae.reporting.plots import (
    GREEN,
    RED,
    Reconstruction,
    direction_figure,
    loss_figure,
    reconstruction_figure,
    retrieval_figure,
    save_png,
)
from csmae.reporting.report import Report, study_figures
from csmae.reporting.study_plots import budget_figure, history_figure
from csmae.reporting.trial_plots import save_trial_plots
from csmae.retrieval.panel import Retrieval
from csmae.sensors import DIRECTIONS
from csmae.tracking.tracker import Direction
from csmae.training.history import append_metrics
from csmae.trials.leaderboard import leaderboard
from csmae.trials.trial import params_of
from tests.support.optuna_studies import add_trial, empty_study, study_of


def scene(seed: int, bands: int) -> Any:
    return np.random.default_rng(seed).normal(500, 100, (bands, 24, 24)).astype(np.float32)


def test_natural_color_is_b04_b03_b02_and_false_color_is_vv_vh_and_their_difference() -> None:
    s2 = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((10, 2, 2), np.float32)
    s1 = np.stack([np.full((2, 2), -18.0), np.full((2, 2), -11.0)]).astype(np.float32)
    assert rgb_channels(s2)[0, 0].tolist() == [2, 1, 0]
    assert rgb_channels(s1)[0, 0].tolist() == [-11, -18, 7]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sampled_from([2, 10]), st.floats(-30, 3000), st.floats(0, 1000))
def test_any_scene_is_rendered_within_the_range_of_colors(seed: int, bands: int, mean: float, spread: float) -> None:
    image = (np.random.default_rng(seed).normal(mean, spread, (bands, 8, 8))).astype(np.float32)
    rendered = render(image)
    assert rendered.shape == (8, 8, 3)
    assert rendered.min() >= 0
    assert rendered.max() <= 1


def test_hidden_pixels_are_gray_and_the_others_do_not_change() -> None:
    image, visible = scene(0, 10), np.zeros((24, 24), bool)
    visible[:12] = True
    rendered = render(image, stretch_of(image), visible)
    assert np.all(rendered[12:] == np.float32(HIDDEN_GRAY))
    assert np.array_equal(rendered[:12], render(image)[:12])


def test_a_reconstruction_has_the_stretch_of_its_original() -> None:
    original = scene(0, 2)
    row = Reconstruction("s1", original, np.ones((24, 24), bool), original + 50, original)
    axes = reconstruction_figure([row], "t").axes
    images = [np.asarray(ax.images[0].get_array()) for ax in axes]
    assert np.array_equal(images[0], images[3])
    assert images[2][..., 0].mean() > images[0][..., 0].mean()


def test_hits_with_shared_labels_are_framed_green_the_others_red() -> None:
    shared = [True, False, True]
    panels = [Retrieval(d, scene(0, 2), [scene(i, 10) for i in range(3)], shared, ["Pastures"]) for d in DIRECTIONS]
    figure = retrieval_figure(panels, "Trial 3")
    frames = [axes.spines["left"].get_edgecolor()[:3] for axes in figure.axes[1:4]]
    assert frames == [to_rgb(GREEN), to_rgb(RED), to_rgb(GREEN)]
    assert [figure.axes[row * 4].get_ylabel() for row in range(4)] == ["S1 → S1", "S1 → S2", "S2 → S1", "S2 → S2"]
    assert "Pastures" in figure.get_suptitle()


def test_each_computed_loss_term_has_its_own_panel() -> None:
    curves = {"train/loss": {1: 3.0, 2: 2.0}, "train/mim": {1: 1.0, 2: 0.5}, "train/lr": {1: 0.1}}
    axes = [ax for ax in loss_figure(curves, "t").axes if ax.lines]
    assert [ax.get_title() for ax in axes] == ["total  (loss)", "mutual information  (mim)"]
    assert np.asarray(axes[1].lines[0].get_ydata()).tolist() == [1.0, 0.5]


def test_the_four_directions_and_their_mean_are_lines_of_one_figure() -> None:
    curves = {f"val/f1/{direction}": {1: 0.1, 2: 0.2} for direction in DIRECTIONS} | {"val/f1_mean": {1: 0.3, 2: 0.4}}
    lines = direction_figure(curves, "t").axes[0].lines
    assert [line.get_label() for line in lines] == ["S1 → S1", "S1 → S2", "S2 → S1", "S2 → S2", "mean"]


@pytest.mark.parametrize(
    ("direction", "best"), [("maximize", [0.3, 0.3, 0.5, 0.5]), ("minimize", [0.3, 0.2, 0.2, 0.2])]
)
def test_the_best_so_far_never_gets_worse(direction: Direction, best: list[float]) -> None:
    board = leaderboard(study_of([0.3, 0.2, 0.5, math.nan], direction))
    line = next(line for line in history_figure(board).axes[0].lines if line.get_label() == "best so far")
    assert np.asarray(line.get_ydata()).tolist() == best


def test_the_budget_counts_the_epochs_of_failed_trials_too() -> None:
    line = budget_figure(leaderboard(study_of([0.3, math.nan, 0.5]))).axes[0].lines[0]
    assert np.asarray(line.get_xdata()).tolist() == [2, 6, 6]


def test_an_axis_is_logarithmic_where_the_space_is() -> None:
    study = empty_study()
    domains = {"optim.lr": FloatDistribution(1e-4, 5e-3, log=True), "loss.mim_weight": FloatDistribution(0, 4)}
    for lr, weight in ((1e-3, 0.001), (2e-3, 4.0)):
        add_trial(study, 0.1, {"optim.lr": lr, "loss.mim_weight": weight}, domains)
    assert [scale_of(study.trials, name).log for name in explored(map(params_of, study.trials))] == [True, False]


def test_choices_over_more_than_a_magnitude_get_a_logarithmic_axis() -> None:
    trials = study_of(
        [0.1, 0.2], optim__lr=[1e-4, 5e-3], masking__ratio=[0.2, 0.8], masking__strategy=["random", "disjoint"]
    ).trials
    assert [scale_of(trials, name).log for name in explored(map(params_of, trials))] == [True, False, False]
    assert scale_of(trials, "masking.strategy").ticks == {0.0: "disjoint", 1.0: "random"}


def test_choices_of_lists_have_one_position_each(tmp_path: Path) -> None:
    study = study_of([0.1, 0.2, 0.3], optim__betas=[[0.9, 0.95], [0.9, 0.999], [0.9, 0.95]])
    scale = scale_of(study.trials, "optim.betas")
    assert [scale.position(betas) for betas in ([0.9, 0.95], [0.9, 0.999])] == [0.0, 1.0]
    assert "[0.9, 0.95]" in Report(study, tmp_path).markdown()


def test_a_trial_without_a_conditional_parameter_has_a_gap_in_its_line() -> None:
    study = empty_study()
    add_trial(study, 0.1, {"loss.mim_weight": 0.0, "optim.lr": 1e-3})
    add_trial(study, 0.2, {"loss.mim_weight": 1.0, "loss.temperature": 0.5})
    lines = parallel_figure(leaderboard(study)).axes[0].lines[:2]
    assert any(np.isnan(np.asarray(line.get_ydata(), float)).any() for line in lines)


def test_every_figure_of_a_study_can_be_drawn_even_for_one_trial(tmp_path: Path) -> None:
    one = {name for name, _ in study_figures(leaderboard(study_of([0.3], masking__ratio=[0.5])), {})}
    assert one == {"history", "budget", "time"}
    study = study_of([0.3, 0.4], masking__ratio=[0.5, 0.6], loss__norm_pix=[True, False])
    for name, figure in study_figures(leaderboard(study), {"masking.ratio": 1.0}):
        assert imread(save_png(figure, tmp_path / f"{name}.png")).shape[2] == 4
    assert len(list(tmp_path.iterdir())) == 6
    assert list(study_figures(leaderboard(study_of([math.nan])), {})) == []


def test_every_figure_can_be_drawn_if_all_trials_were_stopped_early() -> None:
    study = empty_study()
    for ratio in (0.5, 0.6):
        add_trial(study, 0.3, {"masking.ratio": ratio}, state=TrialState.PRUNED)
    assert len(list(study_figures(leaderboard(study), {"masking.ratio": 1.0}))) == 6


def test_paused_trials_are_points_of_their_own() -> None:
    study = empty_study()
    piece = {"from": 0, "until": 2, "reason": "first rung", "paused": 2}
    add_trial(study, 0.3, {"masking.ratio": 0.5}, state=TrialState.RUNNING, attributes={"assignments": [piece]})
    figures = dict(study_figures(leaderboard(study), {}))
    assert "paused" in figures["history"].axes[0].get_legend_handles_labels()[1]


def training_arrays(path: Path) -> None:
    """Write the arrays of a training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = {"s1": 2, "s2": 10}
    arrays: dict[str, Any] = {"labels": np.array(["Pastures"])}
    for target, count in bands.items():
        arrays[target] = np.stack([scene(index, count) for index in range(5)])
        arrays[f"{target}_visible"] = np.ones((5, 24, 24), bool)
        arrays[f"query_{target}"] = scene(9, count)
        for source in bands:
            arrays[f"{source}_to_{target}"] = arrays[target]
            arrays[f"hits_{source}_to_{target}"] = arrays[target]
            arrays[f"shared_{source}_to_{target}"] = np.array([True, False, True, True, False])
    np.savez(path, **arrays)


def test_a_trials_plots_show_its_curves_and_its_first_middle_and_last_epoch(tmp_path: Path) -> None:
    for epoch in (1, 3, 5, 7, 9):
        training_arrays(tmp_path / "arrays" / f"epoch-{epoch:04}.npz")
        append_metrics(tmp_path, epoch, {"train/loss": 1 / epoch, "val/f1_mean": 0.3})
    plots = save_trial_plots(0, tmp_path)
    kinds = ("reconstructions", "retrieval")
    expected = {f"epoch-{epoch:04}-{kind}.png" for epoch in (1, 5, 9) for kind in kinds}
    assert {path.name for path in plots.iterdir()} == expected | {"losses.png", "f1.png"}


def test_a_trial_whose_files_are_not_here_has_no_plots(tmp_path: Path) -> None:
    assert not save_trial_plots(3, tmp_path / "trials" / "3").exists()
