"""A query and its hits as images, ready to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
"""(C, H, W), bands in the order of ``csmae.sensors``: dB or reflectance times 10,000."""


class Retrieval(NamedTuple):
    """One query and what was found for it."""

    direction: str
    """Such as ``s1_to_s2``: the query's sensor and the archive's."""
    query: Image
    hits: Sequence[Image]
    """Best first."""
    shared: Sequence[bool] | None
    """Whether a hit has a label in common with the query; None where nobody knows its labels."""
    labels: Sequence[str]
    """The query's."""
