"""One query against a feature store: a scene of the archive or a GeoTIFF in, ranked scenes and their pictures out."""

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

TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class Query:
    """A scene to find others like it."""

    sensor: str
    feature_d: Tensor
    """L2-normalised."""
    picture: Image
    labels_c: NDArray[np.bool_] | None
    """None where nobody knows them."""


@dataclass(frozen=True)
class Found:
    """What one sensor's part of an archive holds for a query, best first."""

    direction: str
    places: list[int]
    """In the store."""
    cosines: list[float]


def read_query(text: str, sensor: str, store: FeatureStore, encoder: SensorEncoder) -> Query:
    """Read and encode a query.

    Args:
        text: Path of a GeoTIFF, or the S2 patch name of a scene in the archive that the store was made from.
        sensor: Which of the scene's images asks.
        store: Made with this encoder.
        encoder: Encodes the query.

    Raises:
        StoreError: The store was made with another encoder.
        ConfigError: The archive lacks the name, or the GeoTIFF is no scene.
    """
    if encoder.fingerprint() != store.facts["encoder"]:
        raise StoreError(f"{store.folder}: was made with another encoder: embed the archive with this one")
    if text.lower().endswith(TIFF):
        image = read_scene(Path(text), sensor)
        feature = getattr(encoder.encode(**{sensor: image[None]}), sensor)
        return Query(sensor, normalize(feature, dim=1)[0].cpu(), image, None)
    split = open_archive(store.source.data).named(np.array([text.encode()]), "--query", (sensor,))
    batch = split.read([0])
    feature = encoder.embed(batch)[sensor]
    return Query(sensor, normalize(feature, dim=1)[0].cpu(), picture(batch, sensor, 0), split.labels()[0])


def picture(batch: PairBatch, sensor: str, row: int) -> Image:
    """One image of a batch with the bands that are shown, as ``csmae.reporting.colors`` takes it."""
    image = batch.s1[row] if sensor == "s1" else batch.s2_10m[row]
    return np.asarray(image.float().numpy(), np.float32)


def search(query: Query, store: FeatureStore, k: int) -> Iterator[Found]:
    """The K scenes of each sensor's part of the archive that are most like the query; damaged ones are left out.

    Raises:
        StoreError: K is not between 1 and the number of intact scenes.
    """
    if not 1 <= k <= len(store.names):
        raise StoreError(f"--k must be between 1 and the {len(store.names)} scenes of {store.folder}: found {k}")
    for sensor in store.sensors:
        hits = nearest.search(query.feature_d[None], store.blocks(sensor), k)
        intact = hits.indices_qk.shape[1]
        if intact < k:
            raise StoreError(f"--k must be between 1 and the {intact} intact scenes of {store.folder}: found {k}")
        yield Found(f"{query.sensor}_to_{sensor}", hits.indices_qk[0].tolist(), hits.scores_qk[0].tolist())


def panel(query: Query, found: Found, store: FeatureStore) -> Retrieval:
    """The pictures of a query and its hits, read from the archive."""
    target = found.direction[-2:]
    # By name, for the split may have had missing pairs that the store's embedding skipped.
    split = open_archive(store.source.data).named(store.names[found.places], str(store.folder), (target,))
    batch = split.read(range(len(found.places)))
    hits = [picture(batch, target, row) for row in range(len(found.places))]
    shared: list[bool] | None = None
    if query.labels_c is not None:
        shared = list(map(bool, np.any(store.labels_nc[found.places] & query.labels_c, axis=1)))
    return Retrieval(found.direction, query.picture, hits, shared, class_names(query.labels_c))


def class_names(labels_c: NDArray[np.bool_] | None) -> list[str]:
    """Names of the classes of a scene."""
    return [] if labels_c is None else [CLASSES[index] for index in np.flatnonzero(labels_c)]
