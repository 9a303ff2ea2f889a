"""The benchmark on learning curves, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.conftest import BENCHMARKS
from tests.benchmarks.test_curves import make_table


def start(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / "search_curves.py", *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def figures(*options: object) -> Any:
    process = start(*options)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_it_prints_the_figures_of_each_family_and_draws_them(tmp_path: Path) -> None:
    for name in ("one-a", "two-a"):
        table = make_table()
        names = np.array(table.names)
        np.savez(tmp_path / name, points=table.points, losses=table.losses, log=table.log, names=names)
    rival = {"method": "rival", "task": "one-a", "seed": 0, "workers": 2, "improvements": [[8, 0]]}
    lines = [json.dumps({**rival, "workers": workers}) for workers in (2, 4)]
    (tmp_path / "rivals.jsonl").write_text("\n".join(lines))
    found = figures(
        *(
            "--curves",
            tmp_path,
            "--workers",
            2,
            "--seeds",
            2,
            "--methods",
            "random+asha",
            "best 3 of 100 after an epoch",
        ),
        *("--rivals", tmp_path / "rivals.jsonl", "--processes", 1, "--plot", tmp_path / "regret.png"),
    )
    assert set(found) == {"one", "two"}
    assert set(found["one"]) == {"random+asha", "best 3 of 100 after an epoch", "random", "rivals"}
    assert found["one"]["rivals"]["rival"]["seeds"] == 1 and found["two"]["rivals"] == {}
    assert found["two"]["random+asha"]["speed_up"] > 1 and found["two"]["random+asha"]["ms"] > 0
    assert (tmp_path / "regret.png").stat().st_size > 10_000


def test_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    missing = start(CSMAE_CURVES=str(tmp_path))
    assert missing.returncode and missing.stderr.count("\n") == 1
    assert f"{tmp_path}: there are no tables of learning curves" in missing.stderr
    np.savez(tmp_path / "one-a", points=np.zeros((1, 1)))
    unknown = start("--curves", tmp_path, "--tasks", "three")
    assert unknown.returncode and unknown.stderr.count("\n") == 1 and "no family 'three'" in unknown.stderr
