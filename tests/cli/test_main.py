"""The program as a whole: help, options, usage errors, exit statuses, completion, and the ways to start it."""

import errno
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import csmae
from csmae.cli.main import app, main
from csmae.tracking.provenance import command
from tests.support.searches import ROOT

HEAVY = {"ray", "torch", "mlflow", "matplotlib", "optuna", "lmdb", "timm", "pyarrow", "numpy"}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that runs something, by the words that call it."""
    for name, inner in group.commands.items():
        if hasattr(inner, "commands"):
            yield from commands(inner, (*path, name))
        else:
            yield (*path, name), inner


COMMANDS = dict(commands(get_command(app)))


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def test_the_help_loads_no_heavy_library() -> None:
    code = "import sys; from csmae.cli.main import main; main(['search', '--help']); print(*sys.modules)"
    done = run("-c", code)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split()), done.stderr


def test_the_help_groups_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for panel in ("Search", "Data", "Retrieval", "Results", "Cluster"):
        assert f"─ {panel} ─" in text
    assert {path[0] for path in COMMANDS} <= set(text.split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path, "--help"]) == 0
    assert f"Usage: csmae {' '.join(path)}" in capsys.readouterr().out
    assert all(parameter.help for parameter in COMMANDS[path].params)


def test_an_option_has_the_same_help_in_every_command() -> None:
    texts = defaultdict(set)
    for shell_command in COMMANDS.values():
        for parameter in shell_command.params:
            if parameter.param_type_name == "option":
                texts[parameter.opts[0]].add(parameter.help)
    assert len(texts) > 30
    assert {option: found for option, found in texts.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["serach"], "csmae: No such command 'serach'"),
        (["data", "chekc"], "csmae data: No such command 'chekc'"),
        (["search", "study.yaml", "--sampler", "gp"], "csmae search: No such option: --sampler"),
        (["search", "study.yaml", "--num-trials", "many"], "--num-trials"),
        (["search", "study.yaml", "--num-trials"], "--num-trials"),
        (["embed", "synthetic", "store"], "csmae embed: Missing option '--encoder'"),
        (["evaluate"], "csmae evaluate: Missing argument 'ARCHIVE'"),
        (["preemption-notice", "azure", "--address", "head:6379"], "'azure' is not one of 'aws', 'gcp'"),
        (
            ["data", "stats", "synthetic", "--split", "all"],
            "csmae data stats: Invalid value for '--split': 'all' is not",
        ),
        (
            ["data", "synthesize", "new", "--shares", "0.5"],
            "csmae data synthesize: Option '--shares' requires 3 arguments (see csmae data synthesize --help)",
        ),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert text in err and "--help" in err and err.count("\n") == 1 and out == ""


def test_the_program_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "preemption-notice" in out + err


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"csmae {csmae.__version__}\n"


def test_an_interrupted_command_has_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("csmae.study.schema.study_schema", interrupt)
    assert main(["schema"]) == 130


@pytest.mark.parametrize(
    "defect", [RuntimeError("a defect"), BrokenPipeError(errno.EPIPE, "a defect"), EOFError("a defect")]
)
def test_a_defect_is_not_hidden(defect: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise defect

    monkeypatch.setattr("csmae.study.schema.study_schema", fail)
    with pytest.raises(type(defect), match="a defect"):
        main(["schema"])


def test_a_reader_that_closes_the_pipe_causes_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "csmae", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["-m", "csmae", "--help"], "csmae [OPTIONS] COMMAND"),
        (["search.py", "--help"], "csmae search [OPTIONS]"),
        (["train_worker.py", "--help"], "csmae train [OPTIONS]"),
    ],
)
def test_the_scripts_run_the_program(words: list[str], usage: str) -> None:
    done = run(*words)
    assert done.returncode == 0 and usage in done.stdout, done.stderr
    assert run(words[0], *words[1:-1], "--nothing").returncode == 2


def test_the_shell_completes_commands_and_options() -> None:
    shell = {"_CSMAE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert run("-m", "csmae", COMP_WORDS="csmae se", **shell).stdout.split() == ["search"]
    assert "--num-trials" in run("-m", "csmae", COMP_WORDS="csmae search --num", **shell | {"COMP_CWORD": "2"}).stdout


@pytest.mark.parametrize(
    ("script", "program"),
    [
        (".venv/bin/csmae", ".venv/bin/csmae"),
        ("/opt/my venv/bin/csmae", "'/opt/my venv/bin/csmae'"),
        ("/opt/csmae/__main__.py", "python -m csmae"),
        ("search.py", "python search.py"),
    ],
)
def test_a_printed_command_can_be_typed(script: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "search", "my study.yaml"])
    assert command() == f"{program} search 'my study.yaml'"


def test_a_printed_command_has_no_path_if_the_shell_finds_the_same_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("bin", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "csmae").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    for script, program in (("bin/csmae", "csmae"), ("other/csmae", "other/csmae")):
        monkeypatch.setattr(sys, "argv", [script, "search"])
        assert command() == f"{program} search"
