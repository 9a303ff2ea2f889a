"""A small study and the command that searches it, in a process of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import SMALL

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, **settings: Any) -> Path:
    path = folder / "small.yaml"
    space = {"masking.ratio": {"float": [0.3, 0.7]}}
    path.write_text(yaml.safe_dump({"base": SMALL, "space": space, "search": {"num_trials": 2, **settings}}))
    return path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command in a new session, with its output in a file."""
    command = [sys.executable, str(ROOT / "search.py"), str(folder / "small.yaml"), "--storage", str(folder / "runs")]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [*command, *arguments], stdout=log, stderr=subprocess.STDOUT, text=True, cwd=folder, start_new_session=True
        )


def processes(session: int) -> dict[int, str]:
    """Processes of a session: command lines by process id."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *numbers = stat.read_text().rpartition(")")[2].split()[:4]
            if int(numbers[2]) == session and state != "Z":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().rstrip("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
