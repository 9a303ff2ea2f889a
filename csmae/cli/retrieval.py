"""The commands ``embed``, ``retrieve`` and ``evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import csmae
from csmae.cli.options import (
    Archive,
    Device,
    Encoder,
    NumRetrieved,
    OnError,
    Picture,
    QuerySensor,
    Sensors,
    Split,
    SplitsDir,
    chosen_sensors,
    data_settings,
)
from csmae.config import ConfigError
from csmae.console.terminal import plain_console, print_line, progress_bar

if TYPE_CHECKING:
    from csmae.encoders import SensorEncoder
    from csmae.retrieval.protocol import Evaluation
    from csmae.retrieval.query import Query, RankedScenes
    from csmae.retrieval.store import FeatureStore

CLASS_WIDTH = 27
"""Characters of a class name to print; two names are too long for a table."""


def embed(
    archive: Archive,
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="Folder of the feature store; an incomplete one is resumed.")
    ],
    encoder: Encoder,
    device: Device = None,
    split: Split = "test",
    sensor: Sensors = "both",
    dtype: Annotated[Literal["float16", "float32"], typer.Option(help="Type of the features.")] = "float16",
    splits_dir: SplitsDir = None,
    on_error: OnError = "raise",
) -> int:
    """Write a feature store: the features of one split of an archive."""
    from csmae.retrieval.store import Source, write_store

    source = Source(data_settings(archive, splits_dir, on_error), split, chosen_sensors(sensor))
    num_scenes = len(source.open())
    with progress_bar("scenes", num_scenes) as advance:
        num_damaged = write_store(store, _load_encoder(encoder, device), source, dtype, advance)
    left_out = f", {num_damaged} of them damaged and left out" if num_damaged else ""
    print_line(f"{store}: {num_scenes} scenes of {archive}, split {split}{left_out}")
    return 0


def retrieve(
    store: Annotated[Path, typer.Option(metavar="STORE", help="Feature store that csmae embed wrote.")],
    query: Annotated[
        str, typer.Option(metavar="NAME|FILE.tif", help="Query: the S2 name of a patch in the store, or a GeoTIFF.")
    ],
    sensor: QuerySensor,
    encoder: Encoder,
    device: Device = None,
    k: NumRetrieved = 10,
    output: Picture = Path("retrieved.png"),
) -> int:
    """Find the scenes of a feature store that are most similar to a query, print and draw them."""
    from csmae.reporting.plots import retrieval_figure, save_png
    from csmae.retrieval.query import panel, read_query, search
    from csmae.retrieval.store import open_store

    features = open_store(store)
    image = read_query(query, sensor, features, _load_encoder(encoder, device))
    found = list(search(image, features, k))
    for scenes in found:
        _print_scenes(scenes, image, features)
    panels = [panel(image, scenes, features) for scenes in found]
    try:
        save_png(retrieval_figure(panels, f"{Path(query).name} in {store.name}"), output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {output}: cannot be written: {error}: name another file") from None
    print_line(f"pictures: {output}")
    return 0


def evaluate(
    archive: Archive,
    encoder: Encoder,
    device: Device = None,
    k: NumRetrieved = 10,
    splits_dir: SplitsDir = None,
    on_error: OnError = "raise",
) -> int:
    """Score an encoder by the published protocol: validation scenes query the test split."""
    from csmae.data.archive import open_archive
    from csmae.retrieval.protocol import evaluate as evaluate_encoder

    opened = open_archive(data_settings(archive, splits_dir, on_error))
    with progress_bar("scenes", sum(len(opened.split(name)) for name in ("validation", "test"))) as advance:
        result = evaluate_encoder(_load_encoder(encoder, device), opened, k, advance)
    print_line(f"{archive}: {result.num_queries} validation queries, {result.num_archive} test scenes, k = {k}")
    if missing := result.splits_without_labels:
        splits = f"{'split' if len(missing) == 1 else 'splits'} {' and '.join(missing)}"
        print_line(f"no labels in the {splits}: F1 cannot be computed")
        print_line("Without labels, finding each test scene's image from the other sensor in the test split:")
        print_line(f"recall@1 {100 * result.scores['recall_at_1']:.2f} %, mrr {100 * result.scores['mrr']:.2f} %")
        return 0
    if any(result.unlabeled.values()):
        queries, scenes = result.unlabeled.values()
        print_line(
            f"{queries} of {result.num_queries} queries and {scenes} of {result.num_archive} test scenes carry no label:"
            " they count as not found"
        )
    _print_scores(result)
    return 0


def _load_encoder(encoder: str, device: str | None) -> SensorEncoder:
    import torch

    from csmae.cpus import usable_cpus

    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return csmae.load_encoder(encoder, device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _print_scenes(ranked: RankedScenes, query: Query, store: FeatureStore) -> None:
    from rich.table import Table
    from rich.text import Text

    from csmae.retrieval.query import class_names

    table = Table("", "cosine", "scene and its classes, those of the query in bold", title=ranked.direction, box=None)
    table.title_justify = "left"
    classes_of_query = class_names(query.labels_c)
    for rank, (index, similarity) in enumerate(zip(ranked.indices, ranked.similarities, strict=True), start=1):
        names = [Text(n, "bold" if n in classes_of_query else "") for n in class_names(store.labels_nc[index])]
        scene = Text(f"{store.names[index].decode()}\n") + Text("; ").join(names)
        table.add_row(str(rank), f"{similarity:.4f}", scene)
    plain_console().print(table)


def _print_scores(result: Evaluation) -> None:
    from rich.table import Table

    from csmae.sensors import DIRECTIONS

    names = ("f1", "precision", "recall", "mean_pair_f1")
    scores = Table("in %", *names, title_justify="left", box=None)
    for direction in DIRECTIONS:
        scores.add_row(direction, *(f"{100 * result.scores[f'{name}/{direction}']:.2f}" for name in names))
    scores.add_row("mean", f"{100 * result.scores['f1_mean']:.2f}")
    arrows = [direction.upper().replace("_TO_", "→") for direction in DIRECTIONS]
    classes = Table("hits with the class, in %", "queries", "in archive", *arrows, box=None)
    for row in result.classes:
        rates = [f"{100 * rate:.1f}" if math.isfinite(rate) else "–" for rate in row.hit_rates]
        classes.add_row(row.name, str(row.num_queries), f"{100 * row.archive_fraction:.1f}", *rates)
    for table in (scores, classes):
        table.columns[0].no_wrap, table.columns[0].max_width = True, CLASS_WIDTH
        for column in table.columns[1:]:
            column.justify = "right"
        plain_console().print("", table, sep="\n")
