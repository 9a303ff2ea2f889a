"""A query and its hits as images, ready to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
"""(C, H, W), bands in the order of ``csmae.sensors``: dB or reflectance times 10,000."""


class Retrieval(NamedTuple):
    """One query and its hits."""

    direction: str
    """Such as ``s1_to_s2``: the sensors of the query and of the archive."""
    query: Image
    hits: Sequence[Image]
    """The most similar first."""
    shared: Sequence[bool] | None
    """Whether each hit shares a label with the query; None if the query's labels are unknown."""
    labels: Sequence[str]
    """Classes of the query."""
