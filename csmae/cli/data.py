"""The commands ``data synthesize | check | convert | stats | splits | show``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from csmae.cli.exit_status import FAILED
from csmae.cli.options import (
    Archive,
    OnError,
    Picture,
    Sensors,
    Split,
    SplitsDir,
    chosen_sensors,
    data_settings,
)
from csmae.config import ConfigError, Synthetic
from csmae.console.terminal import print_line, progress_bar

if TYPE_CHECKING:
    from csmae.data.archive import Archive as OpenArchive

app = typer.Typer(help="Create, check, convert and show archives of Sentinel-1/Sentinel-2 pairs.", no_args_is_help=True)

NewFolder = Annotated[Path, typer.Argument(metavar="NEW", help="Folder to create.")]


def _open(archive: str, splits_dir: str | None, on_error: Literal["raise", "skip"]) -> OpenArchive:
    from csmae.data.archive import open_archive

    return open_archive(data_settings(archive, splits_dir, on_error))


@app.command()
def synthesize(
    target: NewFolder,
    size: Annotated[int, typer.Option(metavar="N", help="Scenes in all splits together.")] = 2048,
    shares: Annotated[
        tuple[float, float, float],
        typer.Option(metavar="TRAIN VALIDATION TEST", help="Shares of the splits; they sum to 1."),
    ] = (0.5, 0.25, 0.25),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of all scenes.")] = 0,
) -> int:
    """Write a synthetic archive in the layout of BigEarthNet v2."""
    import numpy as np

    from csmae.data.synthetic.archive import synthesize as write_scenes
    from csmae.data.write import require_new

    require_new(target)
    if min(shares) <= 0 or not np.isclose(sum(shares), 1) or seed < 0:
        raise ConfigError(f"--shares must be positive and sum to 1, and --seed be at least 0: found {shares}")
    num_validation, num_test = (max(1, round(size * share)) for share in shares[1:])
    num_train = size - num_validation - num_test
    if num_train < 1:
        raise ConfigError(f"--size must leave a scene for each split: found {size}")
    settings = Synthetic(num_train=num_train, num_validation=num_validation, num_test=num_test, seed=seed)
    with progress_bar("scenes", size) as advance:
        write_scenes(settings, target, advance)
    print_line(f"{target}: {num_train} train, {num_validation} validation, {num_test} test scenes")
    return 0


@app.command()
def check(
    archive: Archive,
    splits_dir: SplitsDir = None,
    on_error: OnError = "raise",
    checksums: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File of a CRC-32 for each value: written if it does not exist, otherwise compared."
        ),
    ] = None,
) -> int:
    """Read a whole archive and report what is wrong with it; the exit status is 1 if anything is."""
    from csmae.data.check import check_archive
    from csmae.data.errors import ArchiveError
    from csmae.sensors import SENSORS

    try:
        opened = _open(archive, splits_dir, on_error)
    except ArchiveError as error:
        with suppress(OSError):
            next(Path(archive).iterdir(), None)  # a folder that cannot be listed was not checked
            print_line(str(error))
            return FAILED
        raise
    index = opened.lmdb.index
    with progress_bar("values", len(index.keys)) as advance:
        problems = check_archive(opened, checksums, lambda: advance(1))
    size = f"{len(index.keys):,} values, {index.sizes.sum() / 1e9:.2f} GB"
    only = "" if opened.sensors == SENSORS else f", {opened.sensors[0]} only"
    print_line(f"{opened.lmdb.folder}: {opened.version}{only}, {size}: {problems.count} problems")
    for line in problems.lines():
        print_line(line)
    return FAILED if problems.count else 0


@app.command()
def convert(
    archive: Archive,
    target: NewFolder,
    splits_dir: SplitsDir = None,
    on_error: OnError = "raise",
) -> int:
    """Write a BigEarthNet v1 archive in the layout of v2; the same command resumes an interrupted conversion."""
    from csmae.data.convert import convert as write_pairs

    source = _open(archive, splits_dir, on_error)
    num_pairs = sum(len(source.split(name)) for name in source.split_names)
    with progress_bar("pairs, written and compared", 2 * num_pairs) as advance:
        num_written = write_pairs(source, target, advance)
    print_line(f"{target}: {num_written} pairs of {num_pairs}, each compared with its source")
    return 0


@app.command()
def stats(
    archive: Archive,
    splits_dir: SplitsDir = None,
    on_error: OnError = "raise",
    split: Split = "train",
    sensor: Sensors = "both",
) -> int:
    """Print the mean and standard deviation of each band, as YAML for a configuration."""
    from csmae.data.statistics import band_statistics

    pairs = _open(archive, splits_dir, on_error).split(split, chosen_sensors(sensor))
    with progress_bar("pairs", len(pairs)) as advance:
        statistics = band_statistics(pairs, advance)
    print_line("data:")
    for name, values in statistics.items():
        print_line(f"  {name}: [{', '.join(f'{value:.6g}' for value in values)}]")
    return 0


@app.command()
def splits(
    subset: Annotated[Literal["ben-14k"], typer.Argument(help="Subset of BigEarthNet.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Folder of train.csv, val.csv and test.csv, or of the archive's metadata.parquet."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder for the three lists of the subset.")],
) -> int:
    """Write the split lists of a known subset of BigEarthNet."""
    from csmae.data.subsets import write_ben_14k

    counts = write_ben_14k(source, target)
    print_line(f"{target}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return 0


@app.command()
def show(
    archive: Archive,
    splits_dir: SplitsDir = None,
    on_error: OnError = "raise",
    split: Split = "train",
    sensor: Sensors = "both",
    count: Annotated[int, typer.Option(metavar="N", help="Pairs to draw, spread evenly over the split.")] = 16,
    output: Picture = Path("pairs.png"),
) -> int:
    """Draw pairs of an archive with their names and labels."""
    import numpy as np

    from csmae.data.contact_sheet import write_contact_sheet

    pairs = _open(archive, splits_dir, on_error).split(split, chosen_sensors(sensor))
    num_drawn = min(count, len(pairs))
    if num_drawn < 1:
        raise ConfigError(f"--count must be at least 1: found {count}")
    write_contact_sheet(pairs, np.linspace(0, len(pairs) - 1, num_drawn).astype(int).tolist(), output)
    print_line(f"{output}: {num_drawn} pairs of {archive}")
    return 0
