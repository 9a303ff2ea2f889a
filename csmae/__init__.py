"""CSMAE search: cross-sensor masked autoencoders, explored on Ray, tracked in MLflow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csmae.encoders import SensorEncoder

__version__ = "0.2.0"

REMOTE = re.compile("models:/|runs:/|[0-9a-f]{32}$")
"""How an MLflow URI starts; 32 hexadecimal digits alone are the ID of a run."""


def load_encoder(where: str | Path, device: str = "cpu") -> SensorEncoder:
    """Load an encoder for retrieval.

    Args:
        where: A folder with ``encoder.safetensors`` and ``config.json``, an MLflow URI such as
            ``models:/csmae-encoder@champion``, or the ID of a run.
        device: Torch device, such as ``cuda:0``.

    Returns:
        An encoder in evaluation mode: ``encoder.encode(s1=…, s2=…)``.

    Raises:
        EncoderError: The folder is damaged or does not hold an encoder.
        TrackingError: MLflow has no such model.
    """
    from csmae.encoders import SensorEncoder

    folder = Path(where)
    if REMOTE.match(str(where)) and not folder.exists():
        from csmae.tracking.fetch import fetch_encoder

        folder = fetch_encoder(str(where) if ":/" in str(where) else f"runs:/{where}")
    return SensorEncoder.load(folder).to(device)
