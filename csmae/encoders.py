"""The encoder that users take home: raw bands in, features out, one folder on disk.

B batch, C bands, H W pixels, D width.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from csmae.atomic import atomic_write
from csmae.config import Config, ConfigError, Data, Loss, Masking, Model
from csmae.data.pairs import PairBatch
from csmae.data.transforms import Preprocess, upsample
from csmae.model.csmae import CSMAE
from csmae.model.encoder import Encoder
from csmae.model.published import convert_state, infer_model, read_settings
from csmae.sensors import BANDS, SENSORS
from csmae.settings import load_yaml

WEIGHTS, SETTINGS = "encoder.safetensors", "config.json"

FORMAT = "csmae-encoder"

PUBLISHED_SETTINGS = ("cfg.yaml", "args.yaml", "args.json")

STATISTICS = ("s1_mean", "s1_std", "s2_mean", "s2_std")


class EncoderError(ConfigError):
    """An encoder folder that cannot be used, or images that do not fit."""


class Features(NamedTuple):
    """Features of scenes by sensor, each (B, D) float32; None for a sensor that was not given."""

    s1: Tensor | None
    s2: Tensor | None


class SensorEncoder(nn.Module):
    """Encodes images of either sensor into one feature space.

    Args:
        network: Weights.
        model: Their architecture.
        data: Its statistics normalise the bands.
        transpose: Whether the weights expect height and width swapped, as the published ones do.
    """

    def __init__(self, network: Encoder, model: Model, data: Data, transpose: bool = False) -> None:
        super().__init__()
        self.network, self.model, self.data, self.transpose = network, model, data, transpose
        self.prepare = Preprocess(data, model.img_size)

    @property
    def width(self) -> int:
        """Width of a feature, D."""
        return self.model.embed_dim

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where the features will be."""
        return self.network.norm.weight.device

    def forward(
        self, s1: np.ndarray | Tensor | None = None, s2: np.ndarray | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode images as ``encode`` does, with gradients.

        Returns:
            By sensor that was given, features (B, D): a dictionary, for an exported program knows no other class of ours.
        """
        given = {"s1": s1, "s2": s2}
        images = {s: self._normalise(s, image) for s, image in given.items() if image is not None}
        if not images:
            raise EncoderError("encode: give s1=, s2= or both")
        return self._features(images)

    @torch.no_grad()
    def encode(self, s1: np.ndarray | Tensor | None = None, s2: np.ndarray | Tensor | None = None) -> Features:
        """Encode upright images as the archives hold them, without gradients; either sensor alone works.

        Args:
            s1: (B, 2, H, H) backscatter in dB, order VH VV.
            s2: (B, 10, H, H) reflectance times 10,000, order B02 B03 B04 B08 B05 B06 B07 B11 B12 B8A, all at 10 m.

        Images of another size than the network's are resized to it. The sensors' batches may differ in size.

        Returns:
            Features of the sensors that were given; not L2-normalised.

        Raises:
            EncoderError: No image, or one of the wrong shape or with values that are not finite.
        """
        for sensor, image in (("s1", s1), ("s2", s2)):
            given = None if image is None else torch.as_tensor(image)
            if given is not None and given.is_floating_point() and not given.isfinite().all():
                raise EncoderError(f"encode: {sensor} holds values that are not finite: give images without gaps")
        features = self.forward(s1, s2)
        return Features(features.get("s1"), features.get("s2"))

    @torch.no_grad()
    def embed(self, batch: PairBatch) -> dict[str, Tensor]:
        """Encode a batch of the loader: (B, D) under ``s1`` and ``s2``, those of which it has images."""
        images = dict(zip(SENSORS, self.prepare(batch.to(self.device)), strict=True))
        return self._features({s: image for s, image in images.items() if len(image)})

    def save(self, folder: str | Path, details: dict[str, Any] | None = None) -> None:
        """Write ``encoder.safetensors`` and ``config.json``, each under a temporary name and renamed.

        Args:
            folder: Made where it does not exist.
            details: Where the encoder comes from: study, trial, scores; anything JSON can hold.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, settings = self._content()
        with atomic_write(folder / WEIGHTS) as file:
            file.write(weights)
        with atomic_write(folder / SETTINGS) as file:
            file.write(json.dumps(settings | {"details": details or {}}, indent=2).encode())

    def fingerprint(self) -> str:
        """SHA-256 of all that features depend on: weights, architecture, statistics, orientation."""
        return hashlib.sha256(json.dumps(self._content()[1]).encode()).hexdigest()

    def _content(self) -> tuple[bytes, dict[str, Any]]:
        """The weights' file, and what the settings say of it."""
        weights = save({name: t.detach().cpu().contiguous() for name, t in self.network.state_dict().items()})
        settings = {
            "format": FORMAT,
            "version": 1,
            "model": self.model.model_dump(),
            "bands": BANDS,
            "statistics": {name: getattr(self.data, name) for name in STATISTICS},
            "transpose": self.transpose,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        return weights, settings

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder that ``save`` wrote; nothing in it is executed.

        Raises:
            EncoderError: A file is missing, damaged or not ours.
        """
        settings = _read_settings(folder / SETTINGS)
        try:
            weights = (folder / WEIGHTS).read_bytes()
        except OSError as error:
            raise EncoderError(f"{folder / WEIGHTS}: cannot be read: {error.strerror}: fetch it again") from None
        if hashlib.sha256(weights).hexdigest() != settings["sha256"]:
            raise EncoderError(f"{folder / WEIGHTS}: does not match the checksum in {SETTINGS}: fetch it again")
        try:
            model = Model(**settings["model"])
            encoder = cls(Encoder(model), model, Data(**settings["statistics"]), settings["transpose"])
            encoder.network.load_state_dict(load(weights))
        except (ValidationError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise EncoderError(
                f"{folder}: weights and {SETTINGS} do not fit together: {reason}: fetch the folder again"
            ) from None
        return encoder.eval()

    @classmethod
    def from_model(cls, model: CSMAE, config: Config) -> Self:
        """The encoder of a network that is trained with a configuration; shares the network's weights."""
        return cls(model.encoder, config.model, config.data).to(model.encoder.norm.weight.device)

    def _features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.transpose:
            images = {s: image.transpose(2, 3) for s, image in images.items()}
        return {s: f.float() for s, f in self.network.features(images).items()}

    def _normalise(self, sensor: str, image: np.ndarray | Tensor) -> Tensor:
        tensor = torch.as_tensor(image, device=self.device)
        bands = BANDS[sensor]
        if tensor.ndim != 4 or tensor.shape[1] != len(bands) or tensor.shape[2] != tensor.shape[3]:
            raise EncoderError(
                f"encode: {sensor} must be (batch, {len(bands)}, side, side) in the order {' '.join(bands)}, "
                f"found {tuple(tensor.shape)}"
            )
        mean, std = self.prepare.get_buffer(f"{sensor}_mean"), self.prepare.get_buffer(f"{sensor}_std")
        return upsample((tensor.float() - mean) / std, self.model.img_size)


def load_published(weights: Path, settings: Path | None = None) -> SensorEncoder:
    """Read an encoder from a checkpoint of the published code.

    Args:
        weights: ``weights.ckpt`` as the authors share it, or the ``*.ckpt`` of a training run; nothing in it is executed.
        settings: Its ``cfg.yaml`` or ``args.yaml``; the one beside it where None.

    Raises:
        EncoderError: A file is missing or damaged, or is not a whole CSMAE, decoders included.
    """
    named = read_settings(load_yaml(settings or _settings_beside(weights)))
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
        state = {str(name): tensor for name, tensor in content["state_dict"].items()}
    except OSError as error:
        raise EncoderError(f"{weights}: cannot be read: {error.strerror}: {_PUBLISHED_RULE}") from None
    except Exception as error:  # a damaged file fails in any of torch's, pickle's or zip's ways
        reason = " ".join(str(error).split())[:120]
        raise EncoderError(f"{weights}: is no published checkpoint ({reason}): {_PUBLISHED_RULE}") from None
    try:
        model = infer_model(state, named)
        network = CSMAE(model, Masking(), Loss())
        network.load_state_dict(convert_state(state))
    except (ConfigError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(f"{weights}: is no published checkpoint ({reason}): {_PUBLISHED_RULE}") from None
    return SensorEncoder(network.encoder, model, Data(), transpose=True).eval()


_PUBLISHED_RULE = "name a whole weights.ckpt, or the *.ckpt of a training run of the published code"


def _settings_beside(weights: Path) -> Path:
    for name in PUBLISHED_SETTINGS:
        if (path := weights.with_name(name)).exists():
            return path
    raise EncoderError(f"{weights}: needs one of {', '.join(PUBLISHED_SETTINGS)} beside it")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read: {error.strerror}: name an encoder's folder") from None
    except ValueError:
        raise EncoderError(f"{path}: is not JSON: fetch it again") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT or settings.get("version") != 1:
        raise EncoderError(f"{path}: is no {FORMAT} of version 1: export it anew with this version")
    missing = {"model", "bands", "statistics", "transpose", "sha256"} - settings.keys()
    if missing:
        raise EncoderError(f"{path}: lacks {', '.join(sorted(missing))}: fetch it again")
    if settings["bands"] != {sensor: list(names) for sensor, names in BANDS.items()}:
        raise EncoderError(
            f"{path}: is for other bands: {settings['bands']}, this version reads {BANDS}: name an encoder of these"
        )
    return settings
