"""An encoder as a folder for a model hub: weights, settings and a model card with license and citation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csmae.config import ConfigError
from csmae.encoders import SensorEncoder, load_published
from csmae.tracking.fetch import fetch_encoder
from csmae.tracking.model_card import UNKNOWN, model_card, read_settings

FRONT = """---
{license}library_name: csmae
pipeline_tag: image-feature-extraction
tags: [remote-sensing, sentinel-1, sentinel-2, masked-autoencoder, image-retrieval]
---

"""

NO_LICENSE = "No license is declared: ask the owner of the weights before you use or share them."

DATA_TERMS = (
    "The training data is named after the layout of its archive: BigEarthNet itself is under CDLA-Permissive-1.0,"
    " other data in this layout under its owner's terms."
)

BACK = """
## License

{terms}

## Statistics

The encoder normalizes each band with these values.

| Band | Mean | Standard deviation |
|---|---|---|
{statistics}

## Citation

```bibtex
@article{{hackstein2024csmae,
  author  = {{Hackstein, Jakob and Sumbul, Gencer and Clasen, Kai Norman and Demir, Beg{{\\"u}}m}},
  title   = {{Exploring Masked Autoencoders for Sensor-Agnostic Image Retrieval in Remote Sensing}},
  journal = {{IEEE Transactions on Geoscience and Remote Sensing}},
  year    = {{2024}},
  eprint  = {{2401.07782}},
  archivePrefix = {{arXiv}}
}}
```
"""


def export_encoder(source: str, folder: Path, title: str, license_id: str | None) -> None:
    """Write an encoder with its model card.

    Args:
        source: A folder, an MLflow URI, or a ``*.ckpt`` of the published code.
        folder: Folder to create; it may exist if it is empty.
        title: Heading of the model card.
        license_id: License of the weights, as a model hub names it; None if the owner has declared none.

    Raises:
        ConfigError: The source is damaged or not an encoder, or the folder is not empty.
    """
    encoder, details = _load(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty: name a new folder")
    encoder.save(folder, details)
    settings = read_settings(folder)
    origin = {name: str(details.get(name, UNKNOWN)) for name in ("study", "trial", "data")}
    origin["sha256"] = settings["sha256"]
    card = (
        FRONT.format(license=f"license: {license_id}\n" if license_id else "")
        + model_card(title, settings, origin, _numbers(details.get("metrics")), folder.resolve().name)
        + BACK.format(statistics=_statistics(settings), terms=_terms(license_id, origin["data"]))
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _terms(license_id: str | None, data: str) -> str:
    """The license of the weights and the terms of the data; any archive in BigEarthNet's layout is named after it."""
    terms = f"The weights are under the license `{license_id}`." if license_id else NO_LICENSE
    return f"{terms} {DATA_TERMS}" if data.startswith("BigEarthNet") else terms


def _numbers(metrics: object) -> dict[str, float]:
    """The numbers among an encoder's metrics; another program may have written its settings."""
    values = metrics if isinstance(metrics, dict) else {}
    return {str(name): value for name, value in values.items() if isinstance(value, int | float)}


def _load(source: str) -> tuple[SensorEncoder, dict[str, Any]]:
    """The encoder, and the details of its origin."""
    if source.endswith(".ckpt"):
        return load_published(Path(source)), {"study": "the published code", "data": "BigEarthNet"}
    folder = fetch_encoder(source) if source.startswith(("models:/", "runs:/")) else Path(source)
    encoder = SensorEncoder.load(folder)
    details = read_settings(folder).get("details")
    return encoder, details if isinstance(details, dict) else {}


def _statistics(settings: dict[str, Any]) -> str:
    rows = (
        f"| {band} | {mean:g} | {std:g} |"
        for sensor, bands in settings["bands"].items()
        for band, mean, std in zip(
            bands, settings["statistics"][f"{sensor}_mean"], settings["statistics"][f"{sensor}_std"], strict=True
        )
    )
    return "\n".join(rows)
