"""What the commands of this room do."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

import csmae
from csmae.config import ConfigError, Data
from csmae.console.terminal import plain_console, print_line, progress_bar
from csmae.cpus import usable_cpus
from csmae.data.archive import open_archive
from csmae.encoders import SensorEncoder
from csmae.reporting.plots import retrieval_picture, save_png
from csmae.retrieval.protocol import Evaluation, evaluate
from csmae.retrieval.query import Found, Query, class_names, panel, read_query, search
from csmae.retrieval.store import FeatureStore, Source, open_store, write_store
from csmae.sensors import DIRECTIONS, SENSORS

CLASS_WIDTH = 27
"""Characters of a class's name; two are far longer than a terminal has room for."""


def _data(options: argparse.Namespace) -> Data:
    return Data(path=options.data, splits_dir=options.splits_dir, on_error=options.on_error)


def _encoder(options: argparse.Namespace) -> SensorEncoder:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    try:
        return csmae.load_encoder(options.encoder, device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None


def embed(options: argparse.Namespace) -> int:
    """Make a feature store."""
    source = Source(_data(options), options.split, SENSORS if options.sensor == "both" else (options.sensor,))
    count = len(source.open())
    with progress_bar("scenes", count) as advance:
        damaged = write_store(options.store, _encoder(options), source, options.dtype, advance)
    left_out = f", {damaged} of them damaged and left out" if damaged else ""
    print_line(f"{options.store}: {count} scenes of {options.data}, split {options.split}{left_out}")
    return 0


def retrieve(options: argparse.Namespace) -> int:
    """Print and draw what is like a query."""
    store = open_store(options.archive)
    query = read_query(options.query, options.sensor, store, _encoder(options))
    found = list(search(query, store, options.top))
    for each in found:
        _show_hits(each, query, store)
    panels = [panel(query, each, store) for each in found]
    title = f"{Path(options.query).name} in {options.archive.name}"
    try:
        save_png(retrieval_picture(panels, title), options.output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {options.output}: cannot be written: {error}: name another file") from None
    print_line(f"pictures: {options.output}")
    return 0


def _show_hits(found: Found, query: Query, store: FeatureStore) -> None:
    table = Table("", "cosine", "scene and its classes, those of the query in bold", title=found.direction, box=None)
    table.title_justify = "left"
    asked = class_names(query.labels_c)
    for rank, (place, cosine) in enumerate(zip(found.places, found.cosines, strict=True), start=1):
        names = [Text(n, "bold" if n in asked else "") for n in class_names(store.labels_nc[place])]
        scene = Text(f"{store.names[place].decode()}\n") + Text("; ").join(names)
        table.add_row(str(rank), f"{cosine:.4f}", scene)
    plain_console().print(table)


def score(options: argparse.Namespace) -> int:
    """Print an encoder's scores by the published protocol."""
    archive = open_archive(_data(options))
    with progress_bar("scenes", sum(len(archive.split(name)) for name in ("validation", "test"))) as advance:
        result = evaluate(_encoder(options), archive, options.k, advance)
    print_line(
        f"{options.data}: {result.num_queries} validation queries, {result.num_archive} test scenes, k = {options.k}"
    )
    if missing := result.without_labels:
        print_line(
            f"no labels in the {'split' if len(missing) == 1 else 'splits'} {' and '.join(missing)}: F1 cannot be computed"
        )
        print_line("Without labels, finding each test scene's image from the other sensor in the test split:")
        print_line(f"recall@1 {100 * result.scores['recall_at_1']:.2f} %, mrr {100 * result.scores['mrr']:.2f} %")
        return 0
    if any(result.unlabelled.values()):
        queries, scenes = result.unlabelled.values()
        print_line(
            f"{queries} of {result.num_queries} queries and {scenes} of {result.num_archive} test scenes carry no label:"
            " they count as not found"
        )
    _show_scores(result)
    return 0


def _show_scores(result: Evaluation) -> None:
    names = ("f1", "precision", "recall", "mean_pair_f1")
    scores = Table("in %", *names, title_justify="left", box=None)
    for direction in DIRECTIONS:
        scores.add_row(direction, *(f"{100 * result.scores[f'{name}/{direction}']:.2f}" for name in names))
    scores.add_row("mean", f"{100 * result.scores['f1_mean']:.2f}")
    arrows = [direction.upper().replace("_TO_", "→") for direction in DIRECTIONS]
    classes = Table("hits with the class, in %", "queries", "in archive", *arrows, box=None)
    for row in result.classes:
        shares = [f"{100 * share:.1f}" if math.isfinite(share) else "–" for share in row.shares]
        classes.add_row(row.name, str(row.num_queries), f"{100 * row.in_archive:.1f}", *shares)
    for table in (scores, classes):
        table.columns[0].no_wrap, table.columns[0].max_width = True, CLASS_WIDTH
        for column in table.columns[1:]:
            column.justify = "right"
        plain_console().print("", table, sep="\n")
