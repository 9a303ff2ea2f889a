"""``csmae search``: mistakes are rejected in one line; a real search runs on a real Ray."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pytest

import csmae
from csmae.cli.main import main
from csmae.cpus import usable_cpus
from tests.support.archives import without_labels, write_v2
from tests.support.searches import processes, start, write


def error_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is rejected."""
    assert main(["search", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_mistakes_are_rejected_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, runs = str(write(tmp_path)), ["--storage", str(tmp_path / "runs")]
    assert "cannot be read" in error_line([str(tmp_path / "absent.yaml"), *runs], capsys)
    assert "did you mean 'masking.ratio'?" in error_line([path, *runs, "--set", "masking.rato=1"], capsys)
    assert "needs 64 GPUs" in error_line([path, *runs, "--gpus-per-worker", "64"], capsys)
    assert "needs 4000 CPUs" in error_line(
        [path, *runs, "--workers-per-trial", "4000", "--set", "optim.batch_size=4000"], capsys
    )
    all_cpus = ["--set", f"optim.batch_size={usable_cpus()}", "--workers-per-trial", str(usable_cpus())]
    assert "pbt trains at least two trials at once, and this machine has the resources for one of" in error_line(
        [path, *runs, "--set", "search.strategy=pbt", *all_cpus], capsys
    )
    assert "no-such-folder" in error_line([path, *runs, "--set", "data.path=/no-such-folder"], capsys)
    assert "batch_size 64 is larger" in error_line([path, *runs, "--set", "optim.batch_size=64"], capsys)
    assert "eval.k 30" in error_line([path, *runs, "--set", "eval.k=30"], capsys)
    bare = ["--set", f"data.path={without_labels(write_v2(tmp_path / 'bare'))}", "--set", "optim.batch_size=2"]
    assert "holds no labels, which val/f1_mean needs" in error_line([path, *runs, *bare, "--set", "eval.k=1"], capsys)
    label_free = [
        "--set",
        "search.objectives={val/mrr: maximize}",
        "--set",
        "search.constraints={val/f1_mean: '>= 0.1'}",
    ]
    assert "holds no labels, which val/f1_mean needs" in error_line(
        [path, *runs, *bare, "--set", "eval.k=1", *label_free], capsys
    )
    assert "--name" in error_line([path, *runs, "--name", "a/b"], capsys)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_space_and_what_a_trial_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(write(tmp_path)), "--dry-run", "--storage", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "masking.ratio: float 0.3 to 0.7" in out
    assert out.count("M parameters") == 6
    assert "a trial needs 1 x 1 CPU" in out
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_search_resumes_and_ends_with_a_champion_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, workers_per_trial=2, strategy="none")
    driver = start(tmp_path)
    while "epoch 2/4" not in (tmp_path / "log").read_text():
        assert driver.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGINT)  # a terminal sends Ctrl-C to the whole process group
    assert driver.wait(120) == 130
    log = (tmp_path / "log").read_text()
    assert "stopped cleanly; to resume: python" in log and "Traceback" not in log
    assert not processes(driver.pid)

    driver = start(tmp_path, "--num-trials", "2")
    assert driver.wait(200) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert log.count("--num-trials") == 1 and "--num-trials N" in log
    assert "trial 0 resumes" in log and "trial 0 epoch 1/4" not in log and "trial 1 starts" in log
    assert "untrained encoder" in log and "champion: trial" in log
    assert all(len(line) <= 80 for line in log.splitlines() if " trial " in line[:20])
    assert not processes(driver.pid)

    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/runs/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert all(sorted(trial.intermediate_values) == [1, 2, 3, 4] for trial in trials)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs/mlflow.db")
    encoder = csmae.load_encoder("models:/csmae-encoder@champion")
    features = encoder.encode(s1=np.zeros((2, 2, 120, 120), np.float32))
    assert features.s1 is not None and features.s1.shape == (2, encoder.width)
    runs: Any = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert len(runs) == 3
    assert {run.data.tags.get("csmae.state") for run in runs} >= {"COMPLETE"}
