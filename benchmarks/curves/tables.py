"""Tables of learning curves of real trainings: a search trains a proposal by reading its curve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FOLDER = "CSMAE_CURVES"
"""Environment variable that names the folder of tables."""

CURVES = Path(__file__).resolve().parents[3] / "shared" / "curves"
"""Default folder: an optional sibling of the checkout."""

BEST_RATIO = 0.01
"""Share of a table's configurations that count as found."""


@dataclass(frozen=True, eq=False)
class Table:
    """Curves of N configurations with P hyperparameters over E epochs.

    Args:
        name: The file's, without suffix; its part before the first ``-`` is the family.
        names: Of the hyperparameters.
        log: (P,) Whether a hyperparameter is spread on a logarithmic scale.
        points: (N, P) The configurations.
        losses: (N, E) Loss after each epoch, smaller is better; NaN from the epoch in which the training diverged.
    """

    name: str
    names: tuple[str, ...]
    log: NDArray[np.bool_]
    points: Floats
    losses: Floats

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read an ``.npz`` file."""
        with np.load(path) as file:
            names = tuple(map(str, file["names"]))
            points, losses = file["points"].astype(float), file["losses"].astype(float)
            return cls(path.stem, names, file["log"].astype(bool), points, losses)

    @property
    def family(self) -> str:
        """The benchmark that the table belongs to."""
        return self.name.partition("-")[0]

    @property
    def epochs(self) -> int:
        """Epochs of a complete training."""
        return int(self.losses.shape[1])

    @cached_property
    def bounds(self) -> list[tuple[float, float]]:
        """Smallest and largest value of each hyperparameter."""
        return list(zip(self.points.min(axis=0).tolist(), self.points.max(axis=0).tolist(), strict=True))

    @cached_property
    def _scale(self) -> tuple[Floats, Floats]:
        """(P,) offset and width of each axis, in the logarithm where it is logarithmic."""
        low, high = (self._logs(np.array(ends)) for ends in zip(*self.bounds, strict=True))
        return low, high - low

    def _logs(self, points: Floats) -> Floats:
        return np.where(self.log, np.log(np.where(self.log, points, 1.0)), points)

    def to_unit(self, points: Floats) -> Floats:
        """Scale points (…, P) to the unit cube."""
        low, width = self._scale
        return np.asarray((self._logs(points) - low) / width)

    def from_unit(self, units: Floats) -> Floats:
        """Scale points (…, P) of the unit cube back, clipped to the bounds against rounding errors."""
        low, width = self._scale
        values = low + units * width
        points = np.where(self.log, np.exp(np.where(self.log, values, 0.0)), values)
        return np.asarray(np.clip(points, *np.array(self.bounds).T))

    def point(self, unit: Floats) -> dict[str, float]:
        """Name the values of a point (P,) of the unit cube."""
        return dict(zip(self.names, self.from_unit(unit).tolist(), strict=True))

    @cached_property
    def units(self) -> Floats:
        """(N, P) The configurations in the unit cube."""
        return self.to_unit(self.points)

    def nearest(self, point: Mapping[str, float], used: NDArray[np.bool_]) -> int:
        """Row of the nearest configuration that is not used yet.

        Args:
            point: A value for each hyperparameter.
            used: (N,) The rows that are used. Once all are, they are used again.
        """
        unit = self.to_unit(np.array([point[name] for name in self.names]))
        distances = ((self.units - unit) ** 2).sum(axis=1)
        return int(np.where(used & ~used.all(), np.inf, distances).argmin())

    @cached_property
    def finals(self) -> Floats:
        """(N,) Loss at the end of the training; infinite where it diverged."""
        return np.where(np.isnan(self.losses).any(axis=1), np.inf, self.losses[:, -1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) Epochs that a training takes: all, or those up to the one in which it diverged."""
        diverged = np.isnan(self.losses)
        return np.where(diverged.any(axis=1), diverged.argmax(axis=1) + 1, self.epochs)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """(N,) Rank of each configuration by its final loss, 0 is the best."""
        ranks = np.empty(len(self.finals), dtype=np.int64)
        ranks[np.argsort(self.finals, kind="stable")] = np.arange(len(ranks))
        return ranks

    @property
    def num_best(self) -> int:
        """Number of configurations that count as found: 1 % of the table."""
        return max(1, round(len(self.finals) * BEST_RATIO))

    @cached_property
    def regrets(self) -> Floats:
        """(N,) Normalized regret by rank: 0 for the best configuration, 1 for the median one and all that are worse."""
        ordered = np.sort(self.finals)
        best, median = ordered[0], ordered[len(ordered) // 2]
        return np.asarray(np.minimum((ordered - best) / (median - best), 1.0))


def curves_dir(folder: Path | None = None) -> Path:
    """The folder of tables: the given one, that of ``CSMAE_CURVES``, or the checkout's sibling.

    Raises:
        FileNotFoundError: It does not exist, or holds no table; one line.
    """
    folder = folder or Path(os.environ.get(FOLDER) or CURVES)
    if not any(folder.glob("*.npz")):
        raise FileNotFoundError(
            f"{folder}: there are no tables of learning curves (*.npz): name their folder with --curves or {FOLDER}"
        )
    return folder


def read_tables(folder: Path, names: Sequence[str] = ()) -> list[Table]:
    """Read the tables of a folder in the order of their names.

    Args:
        folder: Holds ``.npz`` files.
        names: Tables or families to read; all by default.

    Raises:
        ValueError: A name is neither a table nor a family; one line.
    """
    paths = sorted(folder.glob("*.npz"))
    known = {path.stem for path in paths} | {path.stem.partition("-")[0] for path in paths}
    for name in names:
        if name not in known:
            raise ValueError(
                f"{folder}: there is no table and no family {name!r}; there are {', '.join(sorted(known))}"
            )
    wanted: Any = (path for path in paths if not names or {path.stem, path.stem.partition("-")[0]} & set(names))
    return [Table.read(path) for path in wanted]
