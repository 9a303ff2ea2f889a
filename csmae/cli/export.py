"""The command ``export``: an encoder as a folder that a model hub takes."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from csmae.config import ConfigError
from csmae.console.terminal import print_line
from csmae.encoders import WEIGHTS, SensorEncoder, load_published
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

The encoder normalises each band by these itself.

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


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; it sets ``run``, which takes the parsed options and returns the exit code."""
    export = subparsers.add_parser("export", help="write an encoder as a folder for a model hub")
    export.add_argument(
        "source",
        help="an encoder's folder, models:/… or runs:/…, or a *.ckpt of the published code beside its settings",
    )
    export.add_argument("folder", type=Path, help="new or empty; gets encoder.safetensors, config.json, README.md")
    export.add_argument("--name", help="title of the model card (default: the folder's name)")
    export.add_argument(
        "--license",
        metavar="ID",
        help="license that the owner grants, as a model hub names it (default: none is named)",
    )
    export.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    title = options.name or options.folder.resolve().name
    export_encoder(options.source, options.folder, title, options.license)
    if not options.license:
        print_line(
            f"{options.folder}: the model card names no license; if the owner grants one, export again with --license ID"
        )
    return 0


def export_encoder(source: str, folder: Path, title: str, license_id: str | None) -> None:
    """Write an encoder with its model card.

    Args:
        source: A folder, an MLflow address, or a ``*.ckpt`` of the published code.
        folder: New or empty.
        title: Heading of the card.
        license_id: Of the weights, as a model hub names it; None where the owner has named none.

    Raises:
        ConfigError: The source is damaged or not ours, or the folder has something in it.
    """
    encoder, details = _load(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty: name a new folder")
    encoder.save(folder, details)
    settings = read_settings(folder)
    origin = {name: str(details.get(name, UNKNOWN)) for name in ("study", "trial", "data")}
    origin["sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    card = (
        FRONT.format(license=f"license: {license_id}\n" if license_id else "")
        + model_card(title, settings, origin, _numbers(details.get("metrics")), folder.resolve().name)
        + BACK.format(statistics=_statistics(settings), terms=_terms(license_id, origin["data"]))
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _terms(license_id: str | None, data: str) -> str:
    """What the card says of rights. Only the owner can grant one, and any archive of BigEarthNet's layout bears its name."""
    terms = f"The weights are under the license `{license_id}`." if license_id else NO_LICENSE
    return f"{terms} {DATA_TERMS}" if data.startswith("BigEarthNet") else terms


def _numbers(metrics: object) -> dict[str, float]:
    """What is a number of the metrics that an encoder's settings hold; they may be of any program."""
    found = metrics if isinstance(metrics, dict) else {}
    return {str(name): value for name, value in found.items() if isinstance(value, int | float)}


def _load(source: str) -> tuple[SensorEncoder, dict[str, Any]]:
    """The encoder and what is known of where it comes from."""
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
