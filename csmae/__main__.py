"""``python -m csmae``: the commands of all rooms."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import csmae.cli.data
import csmae.cli.doctor
import csmae.cli.export
import csmae.cli.retrieval
import csmae.cli.tracking
import csmae.cluster.preemption
from csmae.config import ConfigError
from csmae.console.terminal import tolerate_encoding_errors

if TYPE_CHECKING:
    from csmae.trials.leaderboard import Leaderboard

ROOMS = (
    csmae.cli.data,
    csmae.cli.retrieval,
    csmae.cli.export,
    csmae.cli.doctor,
    csmae.cluster.preemption,
)


def parser() -> argparse.ArgumentParser:
    """All commands; each sets ``run``."""
    found = argparse.ArgumentParser(
        prog="python -m csmae", description="What can be done with data, encoders and studies."
    )
    subparsers = found.add_subparsers(metavar="COMMAND", required=True)
    for room in ROOMS:
        room.add_commands(subparsers)
    csmae.cli.tracking.add_commands(subparsers, _leaderboard)
    return found


def _leaderboard(folder: Path) -> Leaderboard | None:
    from csmae.trials.leaderboard import stored_leaderboard  # Optuna takes its time

    return stored_leaderboard(folder)


@tolerate_encoding_errors()
def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when all is well, 1 when the command found something wrong, 2 when it cannot do what it was told.
    """
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
