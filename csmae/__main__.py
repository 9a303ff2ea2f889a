"""``python -m csmae``: the commands of all rooms."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import csmae.data.commands
import csmae.doctor
import csmae.retrieving.commands
import csmae.tracking.commands
import csmae.tracking.export
import csmae.tuning.notice
from csmae.config import ConfigError
from csmae.terminal import printable

if TYPE_CHECKING:
    from csmae.tuning.standings import Leaderboard

ROOMS = (
    csmae.data.commands,
    csmae.retrieving.commands,
    csmae.tracking.export,
    csmae.doctor,
    csmae.tuning.notice,
)


def parser() -> argparse.ArgumentParser:
    """All commands; each sets ``run``."""
    found = argparse.ArgumentParser(
        prog="python -m csmae", description="What can be done with data, encoders and studies."
    )
    subparsers = found.add_subparsers(metavar="COMMAND", required=True)
    for room in ROOMS:
        room.add_commands(subparsers)
    csmae.tracking.commands.add_commands(subparsers, _leaderboard)
    return found


def _leaderboard(folder: Path) -> Leaderboard | None:
    from csmae.tuning.standings import stored_leaderboard  # Optuna takes its time

    return stored_leaderboard(folder)


@printable()
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
