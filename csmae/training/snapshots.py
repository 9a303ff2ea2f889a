"""What a network makes of a few validation scenes, kept as arrays at the start, middle and end of a training.

B scenes, L patches, k hits. ``csmae.reporting.trial_plots`` says what a file holds and plots it.
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

from csmae.atomic import atomic_write
from csmae.config import Config
from csmae.data.pairs import PairBatch
from csmae.data.split import Split
from csmae.data.transforms import Preprocess
from csmae.model.csmae import CSMAE
from csmae.model.losses import EPSILON
from csmae.model.patches import patchify, unpatchify
from csmae.out_of_memory import is_out_of_memory
from csmae.retrieval.scores import rank_directions
from csmae.sensors import CLASSES, S2_RGB, SENSORS

log = logging.getLogger(__name__)

NUM_SCENES = 3
NUM_HITS = 10
MASK_SEED = 0
"""Draws the masks: the same at every epoch and in every trial of a patch size, or pictures would not compare."""

Arrays = dict[str, NDArray[Any]]


def is_due(epoch: int, num_epochs: int) -> bool:
    """Whether an epoch, from 1, is the first, the middle or the last."""
    return epoch in (1, (num_epochs + 1) // 2, num_epochs)


def write_snapshot(
    path: Path, model: CSMAE, config: Config, validation: Split, features: dict[str, Tensor] | None
) -> None:
    """Write what is to be drawn of an epoch; a full disk or too little memory is told of and ends nothing.

    Args:
        path: Of the ``.npz``.
        model: In evaluation mode.
        config: Of the run.
        validation: Scenes, the first of them are shown.
        features: Of all of them, as the epoch's score read them; without, no retrieval is shown.
    """
    try:
        arrays = _reconstructions(model, config, validation.read(range(min(NUM_SCENES, len(validation)))))
        if features:
            arrays |= _retrieval(validation, features, min(NUM_HITS, config.eval.k))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("%s: out of memory: there will be no pictures of this epoch", path)
        return
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(content.getvalue())
    except OSError as error:
        log.warning("%s: cannot be written (%s): there will be no pictures of this epoch", path, error.strerror)


def _reconstructions(model: CSMAE, config: Config, batch: PairBatch) -> Arrays:
    device = model.encoder.norm.weight.device
    prepare = Preprocess(config.data, config.model.img_size).to(device)
    images = dict(zip(SENSORS, prepare(batch.to(device)), strict=True))
    shape = (2, len(batch.s1), config.model.num_patches)
    noise = torch.from_numpy(np.random.default_rng(MASK_SEED).random(shape, dtype=np.float32)).to(device)
    made = model.reconstruct(images["s1"], images["s2"], noise[0], noise[1])
    size, arrays = config.model.patch_size, {}
    for sensor, image in images.items():
        mean, std = prepare.get_buffer(f"{sensor}_mean"), prepare.get_buffer(f"{sensor}_std")
        arrays[sensor] = _shown(image * std + mean)
        hidden = made.masks[sensor].removed_bl[:, :, None].expand(-1, -1, size**2)
        arrays[f"{sensor}_visible"] = unpatchify(hidden, size)[:, 0].cpu().numpy() == 0
    for (source, target), predicted in made.predictions.items():
        if config.loss.norm_pix:
            variance, mean = torch.var_mean(patchify(images[target], size), dim=-1, keepdim=True)
            predicted = predicted * (variance + EPSILON).sqrt() + mean
        mean, std = prepare.get_buffer(f"{target}_mean"), prepare.get_buffer(f"{target}_std")
        removed = made.masks[source].removed_bl[:, :, None] == 1
        asked = removed if source == target or config.masking.reconstruction == "disjoint" else ~removed
        image = unpatchify(predicted.float().masked_fill(~asked, torch.nan), size)
        arrays[f"{source}_to_{target}"] = _shown(image * std + mean)
    return arrays


def _retrieval(validation: Split, features: dict[str, Tensor], k: int) -> Arrays:
    """The first intact scene as query, and its hits in the half of the split that scores are computed on."""
    half = len(validation) // 2
    first = int(features["s1"][:half].any(dim=1).int().argmax())  # damaged scenes have features of zero
    labels_nc = validation.take([first, *range(half, len(validation))]).labels()
    query = validation.read([first])
    arrays: Arrays = {
        "query_s1": _shown(query.s1)[0],
        "query_s2": _shown(query.s2_10m)[0],
        "labels": np.array(CLASSES)[labels_nc[0]],
    }
    asking = {sensor: f[first : first + 1] for sensor, f in features.items()}
    there = {sensor: f[half:] for sensor, f in features.items()}
    for direction, ranked in rank_directions(asking, there, k).items():
        places = ranked[0].cpu().numpy()
        found = validation.read(half + places)
        arrays[f"hits_{direction}"] = _shown(found.s1 if direction.endswith("s1") else found.s2_10m)
        arrays[f"shared_{direction}"] = (labels_nc[1 + places] & labels_nc[0]).any(axis=1)
    return arrays


def _shown(images_bchw: Tensor) -> NDArray[np.float16]:
    """The bands that pictures show; half precision holds dB and reflectance well enough to look at."""
    largest = torch.finfo(torch.float16).max  # saturated pixels of S2 have 65,535
    images = images_bchw[:, : max(S2_RGB) + 1].cpu().float().clamp(-largest, largest)
    shown: NDArray[np.float16] = images.numpy().astype(np.float16)
    return shown
