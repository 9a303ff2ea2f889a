"""Query a feature store with a scene of the archive or a GeoTIFF."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from csmae.data.archive import open_archive
from csmae.data.pairs import PairBatch
from csmae.encoders import SensorEncoder
from csmae.retrieval import nearest
from csmae.retrieval.geotiff import read_scene
from csmae.retrieval.panel import Image, Retrieval
from csmae.retrieval.store import FeatureStore, StoreError
from csmae.sensors import CLASSES

GEOTIFF_SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True)
class Query:
    """A scene to retrieve similar scenes for."""

    sensor: str
    feature_d: Tensor
    """L2-normalized."""
    image: Image
    labels_c: NDArray[np.bool_] | None
    """None if they are unknown."""


@dataclass(frozen=True)
class RankedScenes:
    """The scenes that a query retrieves in one direction, the most similar first."""

    direction: str
    indices: list[int]
    """Indices in the store."""
    similarities: list[float]
    """Cosine similarities."""


def read_query(text: str, sensor: str, store: FeatureStore, encoder: SensorEncoder) -> Query:
    """Read and encode a query.

    Args:
        text: Path of a GeoTIFF, or S2 patch name of a scene in the archive that the store was made from.
        sensor: The sensor whose image is the query.
        store: Made with this encoder.
        encoder: Encodes the query.

    Raises:
        StoreError: The store was made with another encoder.
        ConfigError: The archive does not contain the name, or the GeoTIFF is not a valid scene.
    """
    if encoder.fingerprint() != store.metadata["encoder"]:
        raise StoreError(f"{store.folder}: was made with another encoder: embed the archive with this one")
    if text.lower().endswith(GEOTIFF_SUFFIXES):
        scene = read_scene(Path(text), sensor)
        feature = getattr(encoder.encode(**{sensor: scene[None]}), sensor)
        return Query(sensor, normalize(feature, dim=1)[0].cpu(), scene, None)
    split = open_archive(store.source.data).select(np.array([text.encode()]), "--query", (sensor,))
    batch = split.read([0])
    feature = encoder.embed(batch)[sensor]
    return Query(sensor, normalize(feature, dim=1)[0].cpu(), _image(batch, sensor, 0), split.labels()[0])


def search(query: Query, store: FeatureStore, k: int) -> Iterator[RankedScenes]:
    """Retrieve, for each sensor of the store, the k scenes that are most similar to the query; never damaged ones.

    Raises:
        StoreError: k is not between 1 and the number of intact scenes.
    """
    if not 1 <= k <= len(store.names):
        raise StoreError(f"--k must be between 1 and the {len(store.names)} scenes of {store.folder}: found {k}")
    for sensor in store.sensors:
        hits = nearest.search(query.feature_d[None], store.blocks(sensor), k)
        intact = hits.indices_qk.shape[1]
        if intact < k:
            raise StoreError(f"--k must be between 1 and the {intact} intact scenes of {store.folder}: found {k}")
        yield RankedScenes(f"{query.sensor}_to_{sensor}", hits.indices_qk[0].tolist(), hits.scores_qk[0].tolist())


def panel(query: Query, ranked: RankedScenes, store: FeatureStore) -> Retrieval:
    """The images of a query and its hits, read from the archive."""
    target = ranked.direction[-2:]
    # By name: the split may have had missing pairs, which the store does not contain.
    split = open_archive(store.source.data).select(store.names[ranked.indices], str(store.folder), (target,))
    batch = split.read(range(len(ranked.indices)))
    hits = [_image(batch, target, row) for row in range(len(ranked.indices))]
    shared: list[bool] | None = None
    if query.labels_c is not None:
        shared = list(map(bool, np.any(store.labels_nc[ranked.indices] & query.labels_c, axis=1)))
    return Retrieval(ranked.direction, query.image, hits, shared, class_names(query.labels_c))


def class_names(labels_c: NDArray[np.bool_] | None) -> list[str]:
    """Names of a scene's classes; none if they are unknown."""
    return [] if labels_c is None else [CLASSES[index] for index in np.flatnonzero(labels_c)]


def _image(batch: PairBatch, sensor: str, row: int) -> Image:
    """One image of a batch, of S2 only the bands at 10 m, which include those that plots show."""
    image = batch.s1[row] if sensor == "s1" else batch.s2_10m[row]
    return np.asarray(image.float().numpy(), np.float32)
