"""The model card of an encoder: what it is, where it comes from, its scores and how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from csmae.sensors import SENSORS
from csmae.tracking.outbox import TrackingError

SCORE_PREFIXES = ("test/", "confirm/", "val/")
"""Prefixes of the metrics that the card shows, in this order."""

ARCHITECTURE = ("variant", "size", "embed_dim", "sensor_depth", "cross_depth", "patch_size", "pooling")
"""Settings of the model that the card shows."""

UNKNOWN = "unknown"
"""Shown where the origin of an encoder is not recorded."""

CARD = """# {title}

An encoder for Sentinel-1 and Sentinel-2 images, trained by cross-sensor masked autoencoding.

| | |
|---|---|
| Study | {study}, trial {trial} |
| Data | {data} |
| Architecture | {architecture} |
| S1 bands | {s1} |
| S2 bands | {s2} |
| SHA-256 | `{sha256}` |

## Scores

| Score | Value |
|---|---|
{scores}

## Use

```python
import csmae

encoder = csmae.load_encoder({address})
features = encoder.encode(s1=s1, s2=s2)  # raw values; either sensor alone works
```

S1 is (batch, {num_s1}, height, width) backscatter in dB, S2 (batch, {num_s2}, height, width) reflectance times 10,000,
all bands at 10 m in the order above. The features are not normalized; compare them by cosine similarity.
The files are `encoder.safetensors` and `config.json`: nothing in them is executed on loading.

## Source

Hackstein, Sumbul, Clasen, Demir: Exploring Masked Autoencoders for Sensor-Agnostic Image Retrieval in Remote Sensing.
IEEE TGRS 2024, arXiv 2401.07782.
"""


def model_card(
    title: str, settings: dict[str, Any], origin: dict[str, str], metrics: dict[str, float], address: str
) -> str:
    """Write the card of an encoder for people who find it in a registry or a model hub.

    Args:
        title: Heading.
        settings: Content of the encoder's ``config.json``.
        origin: ``study``, ``trial``, ``data`` and ``sha256``.
        metrics: By name; the scores among them are shown, those by the published protocol first.
        address: What ``csmae.load_encoder`` takes to load this encoder: a folder, or a URI of MLflow.

    Returns:
        Markdown.
    """
    model, bands = settings.get("model", {}), settings.get("bands", {})
    s1, s2 = (list(bands.get(sensor, ())) for sensor in SENSORS)
    scores = [(name, metrics[name]) for prefix in SCORE_PREFIXES for name in metrics if name.startswith(prefix)]
    return CARD.format(
        title=title,
        address=json.dumps(address, ensure_ascii=False),
        **origin,
        architecture=", ".join(f"{name} {model[name]}" for name in ARCHITECTURE if name in model) or UNKNOWN,
        s1=" ".join(s1),
        s2=" ".join(s2),
        num_s1=len(s1),
        num_s2=len(s2),
        scores="\n".join(f"| {name} | {value:.4f} |" for name, value in scores),
    )


def format_bands(settings: dict[str, Any]) -> str:
    """Format the bands that an encoder reads, in order, as one line."""
    return "; ".join(f"{sensor} {' '.join(names)}" for sensor, names in settings.get("bands", {}).items())


def read_settings(encoder_dir: Path) -> dict[str, Any]:
    """Read the ``config.json`` of an encoder's folder.

    Raises:
        TrackingError: The file cannot be read, or is not JSON.
    """
    path = encoder_dir / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TrackingError(
            f"{path}: cannot be read: {error.strerror}: restore the file, or name another encoder"
        ) from None
    except (ValueError, TypeError):
        raise TrackingError(f"{path}: is not an encoder's config.json: export it again") from None
