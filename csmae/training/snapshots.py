"""Snapshots: reconstructions and retrieved scenes of the first, middle and last epoch, as arrays.

B scenes, L patches, k hits. ``csmae.reporting.trial_plots`` documents the files and plots them.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csmae.atomic import DRAFTS, atomic_write
from csmae.config import Config
from csmae.data.pairs import PairBatch
from csmae.data.split import Split
from csmae.data.transforms import Preprocess
from csmae.model.csmae import CSMAE
from csmae.model.losses import EPSILON
from csmae.model.masking import loss_reads_removed
from csmae.model.patches import patchify, unpatchify
from csmae.out_of_memory import is_out_of_memory
from csmae.retrieval.scores import rank_directions
from csmae.sensors import CLASSES, S2_RGB, SENSORS

log = logging.getLogger(__name__)

NUM_SCENES = 3
NUM_HITS = 10
MASK_SEED = 0
"""Seed of the masks: the same for every epoch and every trial of a patch size, otherwise plots would not be comparable."""

Arrays = dict[str, NDArray[Any]]


def is_due(epoch: int, num_epochs: int) -> bool:
    """Whether a 1-based epoch is the first, the middle or the last."""
    return epoch in (1, (num_epochs + 1) // 2, num_epochs)


def write_snapshot(
    path: Path, model: CSMAE, config: Config, validation: Split, features: dict[str, Tensor] | None
) -> None:
    """Write the snapshot of an epoch. A full disk or too little memory is only logged.

    Args:
        path: The ``.npz`` file.
        model: In evaluation mode.
        config: The run's configuration.
        validation: The validation split; its first scenes are shown.
        features: Features of all its scenes, as the epoch's score used them; None leaves retrieval out.
    """
    try:
        arrays = _reconstructions(model, config, validation.read(range(min(NUM_SCENES, len(validation)))))
        if features:
            arrays |= _retrieval(validation, features, min(NUM_HITS, config.eval.k))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("%s: out of memory: this epoch has no pictures", path)
        return
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed process leaves a draft, and a resumed run does not repeat its epoch.
        for draft in path.parent.glob(DRAFTS):
            draft.unlink(missing_ok=True)
        with atomic_write(path) as file:
            file.write(content.getvalue())
    except OSError as error:
        log.warning("%s: cannot be written (%s): this epoch has no pictures", path, error.strerror)


def _reconstructions(model: CSMAE, config: Config, batch: PairBatch) -> Arrays:
    device, size = model.encoder.norm.weight.device, config.model.patch_size
    preprocess = Preprocess(config.data, config.model.img_size).to(device)
    images = dict(zip(SENSORS, preprocess(batch.to(device)), strict=True))
    shape = (2, len(batch.s1), config.model.num_patches)
    noise = torch.from_numpy(np.random.default_rng(MASK_SEED).random(shape, dtype=np.float32)).to(device)
    output = model.reconstruct(images["s1"], images["s2"], noise[0], noise[1])
    statistics = {s: (preprocess.get_buffer(f"{s}_mean"), preprocess.get_buffer(f"{s}_std")) for s in SENSORS}
    arrays: Arrays = {}
    for sensor, image in images.items():
        mean, std = statistics[sensor]
        arrays[sensor] = _visible_bands(image * std + mean)
        mask_blp = output.masks[sensor].mask_bl[:, :, None].expand(-1, -1, size**2)
        arrays[f"{sensor}_visible"] = unpatchify(mask_blp, size)[:, 0].cpu().numpy() == 0
    for (source, target), predicted in output.predictions.items():
        if config.loss.norm_pix:
            variance, mean = torch.var_mean(patchify(images[target], size), dim=-1, keepdim=True)
            predicted = predicted * (variance + EPSILON).sqrt() + mean
        mean, std = statistics[target]
        removed = output.masks[source].mask_bl[:, :, None] == 1
        in_loss = removed if loss_reads_removed(config.masking, source, target) else ~removed
        image = unpatchify(predicted.float().masked_fill(~in_loss, torch.nan), size)
        arrays[f"{source}_to_{target}"] = _visible_bands(image * std + mean)
    return arrays


def _retrieval(validation: Split, features: dict[str, Tensor], k: int) -> Arrays:
    """The first intact scene as query, and its hits in the half of the split that scores are computed on."""
    half = len(validation) // 2
    first = int(features["s1"][:half].any(dim=1).int().argmax())  # features of damaged scenes are zero
    labels_nc = validation.take([first, *range(half, len(validation))]).labels()
    query = validation.read([first])
    arrays: Arrays = {
        "query_s1": _visible_bands(query.s1)[0],
        "query_s2": _visible_bands(query.s2_10m)[0],
        "labels": np.array(CLASSES)[labels_nc[0]],
    }
    query_features = {sensor: f[first : first + 1] for sensor, f in features.items()}
    archive_features = {sensor: f[half:] for sensor, f in features.items()}
    for direction, ranked in rank_directions(query_features, archive_features, k).items():
        indices = ranked[0].cpu().numpy()
        hits = validation.read(half + indices)
        arrays[f"hits_{direction}"] = _visible_bands(hits.s1 if direction.endswith("s1") else hits.s2_10m)
        arrays[f"shared_{direction}"] = (labels_nc[1 + indices] & labels_nc[0]).any(axis=1)
    return arrays


def _visible_bands(images_bchw: Tensor) -> NDArray[np.float16]:
    """The bands that plots show; half precision is accurate enough for dB and reflectance."""
    largest = torch.finfo(torch.float16).max  # saturated pixels of S2 have 65,535
    images = images_bchw[:, : max(S2_RGB) + 1].cpu().float().clamp(-largest, largest)
    bands: NDArray[np.float16] = images.numpy().astype(np.float16)
    return bands
