"""The trained encoder: raw bands in, features out, one folder on disk; also read from checkpoints of the published code.

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
from csmae.config import Config, ConfigError, Data, Loss, Masking, Model, one_line
from csmae.data.pairs import PairBatch
from csmae.data.transforms import STATISTICS, Preprocess, upsample
from csmae.model.csmae import CSMAE
from csmae.model.encoder import Encoder
from csmae.model.published import convert_state, infer_model, read_settings
from csmae.sensors import BANDS, SENSORS
from csmae.settings import load_yaml

WEIGHTS, SETTINGS = "encoder.safetensors", "config.json"

FORMAT = "csmae-encoder"

_PUBLISHED_SETTINGS = ("cfg.yaml", "args.yaml", "args.json")
"""Files beside a published checkpoint that describe its architecture."""

_PUBLISHED_REMEDY = "pass a complete weights.ckpt, or the *.ckpt of a training run of the published code"


class EncoderError(ConfigError):
    """An encoder or the images passed to it cannot be used."""


class Features(NamedTuple):
    """Features of each sensor, (B, D) float32; None for a sensor without images."""

    s1: Tensor | None
    s2: Tensor | None


class SensorEncoder(nn.Module):
    """Encodes images of either sensor into one feature space.

    Args:
        network: Holds the weights.
        model: Architecture of ``network``.
        data: Statistics that normalize the bands.
        transpose: Whether the weights expect images with height and width swapped, as the published ones do.
    """

    def __init__(self, network: Encoder, model: Model, data: Data, transpose: bool = False) -> None:
        super().__init__()
        self.network, self.model, self.data, self.transpose = network, model, data, transpose
        self.preprocess = Preprocess(data, model.img_size)

    @property
    def width(self) -> int:
        """Size of a feature, D."""
        return self.model.embed_dim

    @property
    def device(self) -> torch.device:
        """Device of the weights and of the features."""
        return self.network.norm.weight.device

    def forward(
        self, s1: np.ndarray | Tensor | None = None, s2: np.ndarray | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode images like ``encode``, but with gradients.

        Returns:
            Features (B, D) by sensor, in a dictionary because exported programs do not support our classes.
        """
        images = {s: self._normalize(s, image) for s, image in (("s1", s1), ("s2", s2)) if image is not None}
        if not images:
            raise EncoderError("encode: pass s1=, s2= or both")
        return self._features(images)

    @torch.no_grad()
    def encode(self, s1: np.ndarray | Tensor | None = None, s2: np.ndarray | Tensor | None = None) -> Features:
        """Encode north-up images with the units of the archives, without gradients; either sensor alone works.

        Images are resized to the network's image size. The batches of the two sensors may differ in size.

        Args:
            s1: Backscatter in dB (B, 2, H, H), order VH VV.
            s2: Reflectance times 10,000 (B, 10, H, H), order B02 B03 B04 B08 B05 B06 B07 B11 B12 B8A, all at 10 m.

        Returns:
            Features of the sensors that were passed; not L2-normalized.

        Raises:
            EncoderError: No image was passed, or one has the wrong shape or values that are not finite.
        """
        for sensor, image in (("s1", s1), ("s2", s2)):
            tensor = None if image is None else torch.as_tensor(image)
            if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
                raise EncoderError(f"encode: {sensor} holds values that are not finite: pass images without gaps")
        features = self.forward(s1, s2)
        return Features(features.get("s1"), features.get("s2"))

    @torch.no_grad()
    def embed(self, batch: PairBatch) -> dict[str, Tensor]:
        """Encode a batch of the loader: features (B, D) of each sensor that the batch has images of."""
        images = dict(zip(SENSORS, self.preprocess(batch.to(self.device)), strict=True))
        return self._features({s: image for s, image in images.items() if len(image)})

    def save(self, folder: str | Path, details: dict[str, Any] | None = None) -> None:
        """Write ``encoder.safetensors`` and ``config.json``, each atomically.

        Args:
            folder: Created if it does not exist.
            details: Origin of the encoder, such as study, trial and scores; must be serializable as JSON.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, settings = self._content()
        with atomic_write(folder / WEIGHTS) as file:
            file.write(weights)
        with atomic_write(folder / SETTINGS) as file:
            file.write(json.dumps(settings | {"details": details or {}}, indent=2).encode())

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that features depend on: weights, architecture, statistics, orientation."""
        return hashlib.sha256(json.dumps(self._content()[1]).encode()).hexdigest()

    def _content(self) -> tuple[bytes, dict[str, Any]]:
        """Return the content of the weights file, and the settings that describe it."""
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
        """Load a folder that ``save`` wrote; nothing in it is executed.

        Raises:
            EncoderError: A file is missing or damaged, or not an encoder's.
        """
        settings = _read_settings(folder / SETTINGS)
        try:
            weights = (folder / WEIGHTS).read_bytes()
        except OSError as error:
            raise EncoderError(f"{folder / WEIGHTS}: cannot be read: {error.strerror}: download it again") from None
        if hashlib.sha256(weights).hexdigest() != settings["sha256"]:
            raise EncoderError(f"{folder / WEIGHTS}: does not match the checksum in {SETTINGS}: download it again")
        try:
            model = Model(**settings["model"])
            encoder = cls(Encoder(model), model, Data(**settings["statistics"]), settings["transpose"])
            encoder.network.load_state_dict(load(weights))
        except (ValidationError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
            raise EncoderError(
                f"{folder}: weights and {SETTINGS} do not match: {one_line(error)}: download the folder again"
            ) from None
        return encoder.eval()

    @classmethod
    def from_model(cls, model: CSMAE, config: Config) -> Self:
        """Create an encoder that shares the weights of a network in training."""
        return cls(model.encoder, config.model, config.data).to(model.encoder.norm.weight.device)

    def _features(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.transpose:
            images = {s: image.transpose(2, 3) for s, image in images.items()}
        return {s: f.float() for s, f in self.network.features(images).items()}

    def _normalize(self, sensor: str, image: np.ndarray | Tensor) -> Tensor:
        tensor = torch.as_tensor(image, device=self.device)
        bands = BANDS[sensor]
        if tensor.ndim != 4 or tensor.shape[1] != len(bands) or tensor.shape[2] != tensor.shape[3]:
            raise EncoderError(
                f"encode: {sensor} must be (batch, {len(bands)}, side, side) in the order {' '.join(bands)}, "
                f"found {tuple(tensor.shape)}"
            )
        mean, std = self.preprocess.get_buffer(f"{sensor}_mean"), self.preprocess.get_buffer(f"{sensor}_std")
        return upsample((tensor.float() - mean) / std, self.model.img_size)


def load_published(weights: Path, settings: Path | None = None) -> SensorEncoder:
    """Load an encoder from a checkpoint of the published code; nothing in it is executed.

    Args:
        weights: The authors' ``weights.ckpt``, or the ``*.ckpt`` of a training run.
        settings: The checkpoint's ``cfg.yaml`` or ``args.yaml``; None uses the one in the same folder.

    Raises:
        EncoderError: A file is missing or damaged, or is not a complete CSMAE including its decoders.
    """
    architecture = read_settings(load_yaml(settings or _find_published_settings(weights)))
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True)
        state = {str(name): tensor for name, tensor in content["state_dict"].items()}
    except OSError as error:
        raise EncoderError(f"{weights}: cannot be read: {error.strerror}: {_PUBLISHED_REMEDY}") from None
    except Exception as error:  # torch, pickle and zip raise many kinds of errors for a damaged file
        raise _not_published(weights, error) from None
    try:
        model = infer_model(state, architecture)
        network = CSMAE(model, Masking(), Loss())
        network.load_state_dict(convert_state(state))
    except (ConfigError, RuntimeError) as error:
        raise _not_published(weights, error) from None
    return SensorEncoder(network.encoder, model, Data(), transpose=True).eval()


def _not_published(weights: Path, error: Exception) -> EncoderError:
    return EncoderError(f"{weights}: is not a published checkpoint ({one_line(error)}): {_PUBLISHED_REMEDY}")


def _find_published_settings(weights: Path) -> Path:
    for name in _PUBLISHED_SETTINGS:
        if (path := weights.with_name(name)).exists():
            return path
    raise EncoderError(f"{weights}: needs one of {', '.join(_PUBLISHED_SETTINGS)} beside it")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read: {error.strerror}: pass an encoder's folder") from None
    except ValueError:
        raise EncoderError(f"{path}: is not JSON: download it again") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT or settings.get("version") != 1:
        raise EncoderError(f"{path}: is not a {FORMAT} of version 1: export it again with this version")
    missing = {"model", "bands", "statistics", "transpose", "sha256"} - settings.keys()
    if missing:
        raise EncoderError(f"{path}: lacks {', '.join(sorted(missing))}: download it again")
    if settings["bands"] != {sensor: list(names) for sensor, names in BANDS.items()}:
        raise EncoderError(
            f"{path}: is for other bands: found {settings['bands']}, expected {BANDS}: pass an encoder for these"
        )
    return settings
