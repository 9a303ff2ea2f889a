"""Terminal output: markup is printed literally, on streams of any encoding, also after the terminal was closed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csmae.cli.main import main
from csmae.console.terminal import plain_console, print_line
from tests.support.archives import write_v2
from tests.support.searches import ROOT, write

BUFFERED = {"PYTHONUNBUFFERED": ""}

MARKUP = "gloo failed: [/__w/pytorch/pytorch/tcp/pair.cc:534] [enforce fail at alloc_cpu.cpp:117] :warning: [bold]"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT, env=os.environ | environment)


def test_markup_is_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(MARKUP)
    plain_console().print(MARKUP, soft_wrap=True)
    assert capsys.readouterr().out == f"{MARKUP}\n" * 2


def test_a_stream_that_lacks_a_character_prints_a_substitute(tmp_path: Path) -> None:
    code = "from csmae.console.terminal import tolerate_encoding_errors, print_line\nwith tolerate_encoding_errors(): print_line('✗ caf\\xe9 → run …')"
    done = run("-c", code, PYTHONIOENCODING="ascii")
    assert done.stdout == b"x caf\\xe9 -> run ...\n", done.stderr.decode()
    assert run("-c", code, PYTHONIOENCODING="latin-1").stdout == b"x caf\xe9 -> run ...\n"
    assert run("-c", code, PYTHONIOENCODING="utf-8").stdout == "✗ café → run …\n".encode()


def test_a_path_that_is_not_text_is_printed(tmp_path: Path) -> None:
    code = "import os\nfrom csmae.console.terminal import tolerate_encoding_errors, print_line\nwith tolerate_encoding_errors(): print_line(os.fsdecode(b'caf\\xe9'))"
    assert run("-c", code, PYTHONIOENCODING="utf-8").stdout == b"caf\\udce9\n"


def test_no_command_needs_a_unicode_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, study = write_v2(tmp_path / "größe"), write(tmp_path)
    commands = [
        ["data", "check", str(archive)],
        ["data", "check", str(tmp_path / "no-größe")],
        ["doctor", "--help"],
        ["search", str(study), "--dry-run", "--storage", str(tmp_path / "größe-runs")],
        ["search", str(study), "--name", "a/…"],
        ["search", "--help"],
        ["--help"],
        ["search", "--größe"],
        ["train", str(tmp_path / "größe.yaml")],
    ]
    for arguments in commands:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii", "strict"))
        main(arguments)
        assert all(stream.errors == "strict" for stream in (sys.stdout, sys.stderr))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


@pytest.mark.parametrize("length", [10, 100_000])
def test_a_broken_pipe_does_not_end_the_process(length: int) -> None:
    code = (
        "from csmae.console.terminal import plain_console, tolerate_closed_terminal\nimport sys, time\n"
        f"with tolerate_closed_terminal():\n    for _ in range(5): plain_console().print('x' * {length}); time.sleep(0.05)\n"
        "    print('continued', file=sys.stderr)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"continued\n"
    assert process.wait(60) == 0


def test_a_closed_terminal_does_not_end_the_process() -> None:
    ours, theirs = os.openpty()
    code = (
        "from csmae.console.terminal import plain_console, tolerate_closed_terminal\nimport sys\n"
        "with tolerate_closed_terminal():\n    sys.stdin.readline()\n    plain_console().print('x'); print('y', file=sys.stderr)\nsys.exit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, cwd=ROOT
    )
    os.close(theirs)
    os.close(ours)
    process.communicate(b"continue\n", 60)
    assert process.returncode == 7


def test_a_slow_reader_misses_lines_but_gets_later_ones(tmp_path: Path) -> None:
    code = (
        "from csmae.console.terminal import tolerate_closed_terminal\nimport os, sys\nos.set_blocking(1, False)\n"
        "with tolerate_closed_terminal():\n    for _ in range(50): print('x' * 10_000, flush=True)\n"
        "    print('full', file=sys.stderr, flush=True)\n    sys.stdin.readline()\n"
        "    print('still here', flush=True)\n    print('y' * 200_000, flush=True)\nsys.exit(7)"
    )
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, env=os.environ | BUFFERED)
    assert process.stdin and process.stdout and process.stderr
    assert process.stderr.readline() == b"full\n"
    os.set_blocking(process.stdout.fileno(), False)  # the other end of the same pipe: empty it
    while process.stdout.read(1 << 16):
        pass
    os.set_blocking(process.stdout.fileno(), True)
    process.stdin.write(b"continue\n")
    process.stdin.close()
    assert b"still here\n" in process.stdout.read()
    assert process.wait(60) == 7, process.stderr.read()


@pytest.mark.parametrize("closed", [("stdin", "stdout"), ("stderr",), ("stdin", "stdout", "stderr")])
def test_no_command_needs_open_streams(
    closed: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = [
        (["data", "check", str(tmp_path / "none")], 2),
        (["search", "--list", "--storage", str(tmp_path)], 0),
        (["search", str(tmp_path / "none.yaml")], 2),
        (["train", str(tmp_path / "none.yaml")], 2),
    ]
    for arguments, status in commands:
        for name in closed:
            monkeypatch.setattr(sys, name, None)
        assert main(arguments) == status


def test_files_never_get_the_descriptors_of_closed_streams(tmp_path: Path) -> None:
    """Otherwise whatever a library writes to standard error would land in a database."""
    code = (
        "import os\nfrom csmae.console.terminal import tolerate_encoding_errors\n"
        f"with tolerate_encoding_errors(), open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    os._exit(sum(os.readlink(f'/proc/self/fd/{n}') == os.devnull for n in range(3)) + 10 * file.fileno())"
    )
    done = subprocess.run(
        f'{sys.executable} -c "$CODE" <&- >&- 2>&-', shell=True, cwd=ROOT, env=os.environ | {"CODE": code}
    )
    assert done.returncode == 33
