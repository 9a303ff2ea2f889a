"""Records how a study was made: command, commit, package versions."""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("csmae", "torch", "ray", "optuna", "mlflow", "numpy")


def provenance() -> dict[str, str]:
    """Tags that identify the program; the commit only if the program runs from a git checkout."""
    tags = {"csmae.command": command(), "csmae.versions": _versions()}
    commit = _git("rev-parse", "HEAD")
    if commit:
        changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
        tags["csmae.git_commit"] = f"{commit} with changes" if changed else commit
        tags["mlflow.source.git.commit"] = commit
    return tags | {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}


def command() -> str:
    """The command line of this process, without users and passwords of URLs in it."""
    script, *words = (re.sub(r"(?<=://)[^/?#]*@", "", word) for word in sys.argv)
    return " ".join([_program(script), *map(shlex.quote, words)])


def _program(script: str) -> str:
    """How a user types the program whose script Python runs."""
    name = Path(script).name
    if name == "__main__.py":
        return "python -m csmae"
    if name != "csmae":
        return f"python {shlex.quote(script)}"
    on_path = shutil.which(name)
    return name if on_path and Path(on_path).resolve() == Path(script).resolve() else shlex.quote(script)


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue  # run from a checkout that is not installed
    return ", ".join(found)


def _git(*arguments: str) -> str:
    """Git's output for the checkout that contains this file; empty without a checkout or git."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
