"""Commands of this room: ``data synthesize | check | convert | stats | splits | show``."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

import numpy as np

from csmae.config import ConfigError, Data, Synthetic
from csmae.console.terminal import print_line, progress_bar
from csmae.data.archive import Archive, ArchiveError, open_archive
from csmae.data.splits import SPLITS
from csmae.data.write import require_new
from csmae.sensors import SENSORS


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this room's commands; each sets ``run``, which takes the parsed options and returns the exit code."""
    data = subparsers.add_parser("data", help="archives of Sentinel-1/Sentinel-2 pairs")
    verbs = data.add_subparsers(metavar="VERB", required=True)
    _add_synthesize(verbs.add_parser("synthesize", help="write a synthetic archive"))
    check = _add_archive(verbs.add_parser("check", help="read a whole archive and say what is wrong with it"))
    check.add_argument("--checksums", type=Path, metavar="FILE", help="CRC-32 of each value: written, or compared with")
    check.set_defaults(run=_check)
    convert = _add_archive(verbs.add_parser("convert", help="write a v1 archive's pairs in the layout of v2"))
    convert.add_argument("target", type=Path, help="new folder")
    convert.set_defaults(run=_convert)
    stats = _add_archive(verbs.add_parser("stats", help="mean and deviation of each band"))
    stats.add_argument("--split", choices=SPLITS, default="train")
    _add_sensor(stats)
    stats.set_defaults(run=_stats)
    splits = verbs.add_parser("splits", help="derive the lists of a known subset")
    splits.add_argument("subset", choices=["ben-14k"])
    splits.add_argument("source", type=Path, help="folder of train.csv, val.csv, test.csv, or of metadata.parquet")
    splits.add_argument("target", type=Path, help="folder for the three lists")
    splits.set_defaults(run=_splits)
    _add_show(_add_archive(verbs.add_parser("show", help="draw pairs with their names and labels")))


def _add_archive(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("path", help="folder of an archive, or synthetic")
    parser.add_argument("--splits-dir", help="folder of train.csv, val.csv, test.csv to use instead")
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="what a damaged pair does")
    return parser


def _add_sensor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sensor", choices=[*SENSORS, "both"], default="both", help="whose images (default: both)")


def _sensors(options: argparse.Namespace) -> tuple[str, ...]:
    return SENSORS if options.sensor == "both" else (options.sensor,)


def _open(options: argparse.Namespace) -> Archive:
    if not options.path:
        raise ConfigError("data.path must name a folder, or be synthetic: found nothing")
    return open_archive(Data(path=options.path, splits_dir=options.splits_dir, on_error=options.on_error))


def _add_synthesize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--size", type=int, default=2048, help="scenes of all splits together")
    parser.add_argument("--shares", type=float, nargs=3, default=(0.5, 0.25, 0.25), metavar="S", help="of the splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_synthesize)


def _synthesize(options: argparse.Namespace) -> int:
    from csmae.data.synthetic.archive import synthesize

    shares = np.array(options.shares)
    require_new(options.target)
    if (shares <= 0).any() or not np.isclose(shares.sum(), 1) or options.seed < 0:
        raise ConfigError(f"--shares must be positive and sum to 1, and --seed be at least 0: found {options.shares}")
    validation, test = (max(1, round(options.size * share)) for share in shares[1:])
    if options.size - validation - test < 1:
        raise ConfigError(f"--size must leave a scene for each split: found {options.size}")
    settings = Synthetic(
        num_train=options.size - validation - test, num_validation=validation, num_test=test, seed=options.seed
    )
    with progress_bar("scenes", options.size) as advance:
        synthesize(settings, options.target, advance)
    print_line(f"{options.target}: {settings.num_train} train, {validation} validation, {test} test scenes")
    return 0


def _check(options: argparse.Namespace) -> int:
    from csmae.data.check import check_archive

    try:
        archive = _open(options)
    except ArchiveError as error:
        with suppress(OSError):
            next(Path(options.path).iterdir(), None)  # a folder that cannot be looked into was not checked
            print_line(str(error))
            return 1
        raise
    num_values = len(archive.store.index.keys)
    with progress_bar("values", num_values) as advance:
        problems = check_archive(archive, options.checksums, lambda: advance(1))
    size = f"{num_values:,} values, {archive.store.index.sizes.sum() / 1e9:.2f} GB"
    kind = f"BigEarthNet {'v1' if archive.is_v1 else 'v2'}"
    alone = "" if archive.sensors == SENSORS else f", {archive.sensors[0]} alone"
    print_line(f"{archive.store.folder}: {kind}{alone}, {size}: {problems.count} problems")
    for line in problems.lines():
        print_line(line)
    return 1 if problems.count else 0


def _convert(options: argparse.Namespace) -> int:
    from csmae.data.convert import convert

    source = _open(options)
    total = sum(len(source.split(name)) for name in source.described)
    with progress_bar("pairs, written and compared", 2 * total) as advance:
        written = convert(source, options.target, advance)
    print_line(f"{options.target}: {written} pairs of {total}, each compared with its source")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from csmae.data.statistics import band_statistics

    split = _open(options).split(options.split, _sensors(options))
    with progress_bar("pairs", len(split)) as advance:
        statistics = band_statistics(split, advance)
    print_line("data:")
    for name, values in statistics.items():
        print_line(f"  {name}: [{', '.join(f'{value:.6g}' for value in values)}]")
    return 0


def _splits(options: argparse.Namespace) -> int:
    from csmae.data.subsets import write_ben_14k

    counts = write_ben_14k(options.source, options.target)
    print_line(f"{options.target}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return 0


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=16, help="pairs to draw, spread over the split")
    _add_sensor(parser)
    parser.add_argument("--output", type=Path, default=Path("pairs.png"), help="PNG (default: pairs.png)")
    parser.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> int:
    from csmae.data.contact_sheet import write_contact_sheet

    split = _open(options).split(options.split, _sensors(options))
    count = min(options.count, len(split))
    if count < 1:
        raise ConfigError(f"--count must be at least 1: found {options.count}")
    write_contact_sheet(split, np.linspace(0, len(split) - 1, count).astype(int).tolist(), options.output)
    print_line(f"{options.output}: {count} pairs of {options.path}")
    return 0
