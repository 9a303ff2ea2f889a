"""Snapshots are written when due, show the right scenes, and are drawn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from csmae.config import Config
from csmae.data.archive import open_archive
from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from csmae.model.losses import normalize_patches
from csmae.model.masking import draw_masks
from csmae.model.patches import patchify
from csmae.reporting.trial_plots import save_trial_plots
from csmae.retrieval.embed import embed
from csmae.retrieval.nearest import search
from csmae.training.snapshots import is_due, write_snapshot
from csmae.training.splits import validation_split
from csmae.training.trainer import pretrain
from tests.conftest import small_config


@pytest.mark.parametrize(
    ("epochs", "due"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (9, [1, 5, 9]), (150, [1, 75, 150])]
)
def test_first_middle_and_last_epoch_are_due(epochs: int, due: list[int]) -> None:
    assert [epoch for epoch in range(1, epochs + 1) if is_due(epoch, epochs)] == due


def snapshot(config: Config, folder: Path, model: Any = None) -> dict[str, Any]:
    network = build_model(config).eval()
    split = validation_split(open_archive(config.data), config)
    features = embed(SensorEncoder.from_model(network, config), split, 16)
    write_snapshot(folder / "epoch-0001.npz", model or network, config, split, features)
    with np.load(folder / "epoch-0001.npz", allow_pickle=False) as content:
        return dict(content)


def test_a_training_writes_arrays_that_become_pictures(tmp_path: Path) -> None:
    list(pretrain(small_config(train__epochs=2), tmp_path))
    assert sorted(path.name for path in (tmp_path / "arrays").iterdir()) == ["epoch-0001.npz", "epoch-0002.npz"]
    plots = save_trial_plots(0, tmp_path)
    assert {"epoch-0001-reconstructions.png", "epoch-0002-retrieval.png"} <= {path.name for path in plots.iterdir()}


def test_the_draft_of_another_epochs_arrays_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".epoch-0002.npz.tmp").write_bytes(b"of a killed process")
    snapshot(small_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001.npz"]


def test_a_snapshot_shows_scenes_of_the_archive_and_hits_of_the_score(tmp_path: Path) -> None:
    config = small_config(masking__ratio=0.75)
    arrays = snapshot(config, tmp_path)
    split = validation_split(open_archive(config.data), config)
    batch, half = split.read(range(3)), len(split) // 2
    np.testing.assert_allclose(arrays["s1"], batch.s1.numpy(), rtol=2e-3, atol=0.02)
    np.testing.assert_allclose(arrays["s2"], batch.s2_10m[:, :3].float().numpy(), rtol=2e-3, atol=2)
    assert arrays["s1_visible"].mean() == pytest.approx(0.25)
    features = embed(SensorEncoder.from_model(build_model(config).eval(), config), split, 16)
    ranked = search(features["s2"][:1], [features["s1"][half:]], config.eval.k).indices_qk[0]
    np.testing.assert_array_equal(arrays["hits_s2_to_s1"], split.read(half + ranked).s1.numpy().astype(np.float16))
    labels = split.labels()
    shared = (labels[half + ranked.numpy()] & labels[0]).any(1)
    assert arrays["shared_s2_to_s1"].tolist() == shared.tolist()


class PerfectModel:
    """Stands in for a network that predicts every patch exactly, normalized if the loss is."""

    def __init__(self, config: Config) -> None:
        self.config, self.encoder = config, build_model(config).encoder

    def reconstruct(self, s1: Tensor, s2: Tensor, noise_s1: Tensor, noise_s2: Tensor) -> Any:
        images, size = {"s1": s1, "s2": s2}, self.config.model.patch_size
        patches = {sensor: patchify(image, size) for sensor, image in images.items()}
        if self.config.loss.norm_pix:
            patches = {sensor: normalize_patches(patch) for sensor, patch in patches.items()}
        self.masks = draw_masks(noise_s1, noise_s2, self.config.masking)
        self.predictions = {(source, target): patches[target] for source in images for target in images}
        return self


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_prediction_is_the_original(norm_pix: bool, tmp_path: Path) -> None:
    config = small_config(loss__norm_pix=norm_pix)
    arrays = snapshot(config, tmp_path, PerfectModel(config))
    for source in ("s1", "s2"):
        for target in ("s1", "s2"):
            predicted, original = (arrays[name].astype(np.float32) for name in (f"{source}_to_{target}", target))
            in_loss = np.isfinite(predicted)
            assert in_loss.mean() == pytest.approx(0.5), "predictions that no loss reads are left out"
            np.testing.assert_allclose(
                predicted[in_loss], original[in_loss], rtol=4e-3, atol=4 if target == "s2" else 0.05
            )
            assert (in_loss[:, 0] == ~arrays[f"{source}_visible"]).all()


def test_without_reconstruction_losses_only_retrieval_is_shown(tmp_path: Path) -> None:
    config = small_config(loss__umr_weight=0, loss__cmr_weight=0)
    arrays = snapshot(config, tmp_path / "arrays")
    assert "s1_to_s2" not in arrays
    plots = save_trial_plots(0, tmp_path)
    assert {path.name for path in plots.glob("epoch-*")} == {"epoch-0001-retrieval.png"}


def test_a_folder_that_cannot_be_written_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    config = small_config()
    split = validation_split(open_archive(config.data), config)
    with caplog.at_level(logging.WARNING):
        write_snapshot(tmp_path / "file" / "epoch-0001.npz", build_model(config).eval(), config, split, None)
    assert "epoch-0001.npz: cannot be written (File exists): this epoch has no pictures" in caplog.text


def test_snapshots_do_not_change_the_training(tmp_path: Path) -> None:
    config = small_config(train__epochs=2)
    with_arrays = [epoch.metrics["train/loss"] for epoch in pretrain(config, tmp_path)]
    without = [epoch.metrics["train/loss"] for epoch in pretrain(config)]
    assert with_arrays == without
