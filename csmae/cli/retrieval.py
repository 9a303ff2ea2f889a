"""Commands of this room: ``embed`` an archive, ``retrieve`` scenes like a query, ``evaluate`` an encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from csmae.data.splits import SPLITS
from csmae.sensors import SENSORS


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this room's commands; each sets ``run``, which takes the parsed options and returns the exit code."""
    embed = _add_archive(subparsers.add_parser("embed", help="make a feature store of an archive's split"))
    embed.add_argument("store", type=Path, help="folder of the store; one that was begun is gone on with")
    embed.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    embed.add_argument("--sensor", choices=[*SENSORS, "both"], default="both", help="whose images (default: both)")
    embed.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="default: float16")
    embed.set_defaults(action="embed")
    retrieve = subparsers.add_parser("retrieve", help="find scenes of a feature store that are like a query")
    retrieve.add_argument("--query", required=True, metavar="NAME|FILE.tif", help="S2 patch name, or a GeoTIFF")
    retrieve.add_argument("--sensor", choices=SENSORS, required=True, help="the query's")
    retrieve.add_argument("--archive", type=Path, required=True, metavar="STORE", help="a folder that embed made")
    retrieve.add_argument("--top", type=int, default=10, metavar="K", help="scenes to find (default: 10)")
    retrieve.add_argument("--output", type=Path, default=Path("retrieved.png"), help="PNG (default: retrieved.png)")
    retrieve.set_defaults(action="retrieve")
    evaluate = _add_archive(subparsers.add_parser("evaluate", help="score an encoder by the published protocol"))
    evaluate.add_argument("--k", type=int, default=10, help="scenes retrieved for each query (default: 10)")
    evaluate.set_defaults(action="score")
    for parser in (embed, retrieve, evaluate):
        parser.set_defaults(run=_run)
        parser.add_argument("--encoder", required=True, help="a folder, or models:/csmae-encoder@champion and the like")
        parser.add_argument("--device", help="such as cuda:0 (default: the GPU where there is one)")


def _add_archive(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("data", metavar="archive", help="folder of a BigEarthNet archive, or synthetic")
    parser.add_argument("--splits-dir", help="folder of train.csv, val.csv, test.csv to use instead")
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what a damaged pair does")
    return parser


def _run(options: argparse.Namespace) -> int:
    from csmae.cli import retrieval_actions as actions  # timm and matplotlib take their time

    return int(getattr(actions, options.action)(options))
