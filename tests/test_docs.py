"""README and docs: every command, option, field, metric, study, file, link and call in them exists."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer import TyperException
from typer.main import get_command

from csmae.cli.main import app
from csmae.config import Config, ConfigError, Section
from csmae.encoders import SensorEncoder
from csmae.sensors import DIRECTIONS
from csmae.settings import merge, parse_assignments, parse_config
from csmae.study.metrics import DESCRIPTIONS, METRICS
from csmae.study.options import Search
from csmae.study.study import PARTS, load_study

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCE = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *(ROOT / "csmae").rglob("*.py")])

PLACEHOLDERS = {"N": "3", "X": "1", "S": "1", "K": "10", "T": "1h"}
"""Values for the letters that a reader replaces."""

FOREIGN = {
    "--allowed-hosts": "mlflow server",
    "--cors-allowed-origins": "mlflow server",
    "--backend-store-uri": "mlflow",
    "--host": "mlflow server",
    "--disable-usage-stats": "ray start",
    "--node-ip-address": "ray start",
    "--output": "sbatch",
}
"""Options of other programs that the text names without the program."""

PROGRAM: Any = get_command(app)
"""The command line's tree: groups have ``commands``, commands have ``params``."""

FOLDERS = ("docs", "spaces", "csmae", "tests", "benchmarks", "clusters")
FILES = re.compile(r"[\w./-]+\.(py|yaml|md|sbatch|txt|toml)(::\w+)?")
METRIC = re.compile(r"(val|test|cost|train|time|system|budget|confirm)/[a-z0-9_/]+")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each block of code."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)


def spans(page: Path) -> list[str]:
    """Texts in backticks, outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M))


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command, also of commands that are an argument of another one."""
    lines = [body.replace("\\\n", " ").splitlines() for language, body in blocks(page) if not language]
    for line in [*(line for body in lines for line in body), *spans(page)]:
        yield from _commands(line)


def _commands(line: str) -> Iterator[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # prose, or output of a command
        return
    for word in words:
        if " " in word:
            yield from _commands(word)
    while "&&" in words:
        yield words[: words.index("&&")]
        words = words[words.index("&&") + 1 :]
    if words:
        yield words


def check_csmae(words: list[str]) -> None:
    """Parse the words after ``csmae``. A command may also be named alone, without its arguments."""
    command: Any = PROGRAM
    path = ["csmae"]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"{' '.join(path)} has no command {name}"
        command = command.commands[name]
        path.append(name)
    if not words:
        return
    try:
        parameters = command.make_context(path[-1], words, resilient_parsing=command is PROGRAM).params
    except TyperException as error:
        raise AssertionError(f"{shlex.join([*path, *words])} is rejected: {error.format_message()}") from None
    check_assignments([text for text in parameters.get("assignments") or () if text != "key=value"])
    if path == ["csmae", "search"]:
        check_file(str(parameters["study"] or "spaces/full.yaml"))


def check_assignments(texts: list[str]) -> None:
    settings = [text.removeprefix("search.").split("=", 1) for text in texts if text.startswith("search.")]
    Search.model_validate({name: yaml.safe_load(value) for name, value in settings})
    fields = parse_assignments([text for text in texts if not text.startswith("search.")])
    parse_config(merge({}, fields), "--set")


def check_file(name: str) -> None:
    if name.split("/")[0] in FOLDERS and "…" not in name:
        assert (ROOT / name.split("::")[0]).exists(), f"{name}: does not exist"


def check_script(words: list[str]) -> None:
    check_file(words[0])
    source = (ROOT / words[0]).read_text()
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, f"{words[0]} has no option {word}"


def check_tests(words: list[str]) -> None:
    for word in words:
        check_file(word)


def check_target(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(words) <= set(targets), f"make {words}"


def checker(words: list[str]) -> tuple[Callable[[list[str]], None], list[str]] | None:
    """The function that checks a command, and the words to give it."""
    match words:
        case ["python", "search.py", *rest]:
            return check_csmae, ["search", *rest] if rest else []
        case ["python", "train_worker.py", *rest]:
            return check_csmae, ["train", *rest]
        case ["torchrun", *rest] if "train_worker.py" in rest:
            return check_csmae, ["train", *rest[rest.index("train_worker.py") + 1 :]]
        case ["torchrun", *rest] if "csmae" in rest:
            return check_csmae, rest[rest.index("csmae") + 1 :]
        case ["python", "-m", "csmae", *rest] | ["csmae", *rest]:
            return check_csmae, rest
        case ["python", script, *rest] if script.endswith(".py"):
            return check_script, [script, *rest]
        case ["pytest", *rest]:
            return check_tests, rest
        case ["sbatch", script, *rest]:
            check_file(script)
            return check_csmae, ["search", *rest] if rest else []
        case ["make", *rest]:
            return check_target, rest
    return None


pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))


@pages
def test_every_command_is_accepted(page: Path) -> None:
    for words in commands(page):
        if found := checker(words):
            check, rest = found
            check(rest)


def test_the_pages_hold_commands() -> None:
    found = [words for page in PAGES for words in commands(page) if checker(words)]
    assert len(found) > 60
    programs = {words[0] for words in found}
    assert programs & {"csmae", "python"} and "make" in programs


def options_of(command: Any) -> Iterator[str]:
    """Options of a command, and of the commands in it."""
    for parameter in command.params:
        yield from parameter.opts
    yield from ("--help", "-h")
    for inner in getattr(command, "commands", {}).values():
        yield from options_of(inner)


@pages
def test_every_option_exists(page: Path) -> None:
    known = set(options_of(PROGRAM))
    for path in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add\w*\(\s*"(--[\w-]+)"', path.read_text()))
    named = {re.split(r"[ =]", span)[0] for span in spans(page) if span.startswith("--")}
    assert named - known - FOREIGN.keys() == set()


@pages
def test_every_yaml_block_is_valid(page: Path, tmp_path: Path) -> None:
    for language, body in blocks(page):
        if language == "yaml":
            content = yaml.safe_load(body)
            if content.keys() <= set(PARTS):
                study = {"space": {"masking.ratio": {"float": [0.3, 0.9]}}, **content}
                (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
                load_study(tmp_path / "study.yaml")
            elif content.keys() <= Config.model_fields.keys():
                parse_config(content, page.name)


def dotted_names(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Names of fields and of the sections in between."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                yield from dotted_names(part, f"{prefix}{name}.")


@pages
def test_every_field_exists(page: Path) -> None:
    known = {*dotted_names(Config), *dotted_names(Search, "search.")}
    sections = {name.split(".")[0] for name in known}
    for span in spans(page):
        name, _, value = re.split(r"(=|: )", span, maxsplit=1) if re.search(r"=|: ", span) else (span, "", "")
        if name in Search.model_fields and ": " in span and "…" not in span:
            Search.model_validate({name: yaml.safe_load(value)})
        if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", name) and name.split(".")[0] in sections:
            if name.rpartition(".")[2] in ("py", "csv", "mdb"):
                continue
            assert name in known, f"{page.name}: there is no field {name}"
            if value and "…" not in value:
                check_assignments([f"{name}={value}"])


@pages
def test_every_metric_exists(page: Path) -> None:
    for span in spans(page):
        if METRIC.fullmatch(span):
            leaf = span.partition("/")[2]
            known = (
                span in METRICS
                or f'"{span}"' in SOURCE
                or (f'"{leaf}"' in SOURCE and f'"{span[: -len(leaf)]}' in SOURCE)
            )
            assert known, f"{page.name}: nothing reports {span}"


@pages
def test_every_file_exists(page: Path) -> None:
    for span in spans(page):
        name = span.split("::")[0]
        if "/" in name and FILES.fullmatch(name) and not name.startswith(("runs/", "./", "/", "~")):
            assert any((folder / name).exists() for folder in (ROOT, ROOT / "csmae")), f"{page.name}: {name}"


def anchors(page: Path) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_every_link_has_a_target(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if not target.startswith(("http", "mailto")):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


@pages
def test_every_python_call_matches_its_signature(page: Path) -> None:
    for language, body in blocks(page):
        if language == "python":
            check_python(ast.parse(body))
    for span in spans(page):
        if re.fullmatch(r"csmae(\.\w+)+(\(.*\))?", span) and f'"{span}"' not in SOURCE:
            check_python(ast.parse(f"import csmae\n{span}"))


def check_python(tree: ast.Module) -> None:
    known: dict[str, Any] = {"encoder": SensorEncoder}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.name.split(".")[0]: importlib.import_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, known)
        elif isinstance(node, ast.Call):
            named = ast.unparse(node.func) == "encoder"
            function = SensorEncoder.forward if named else resolve(node.func, known)
            if function is not None and (getattr(function, "__module__", "") or "").startswith("csmae"):
                itself = [None] if ast.unparse(node.func).startswith("encoder") else []
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(function).bind(*itself, *node.args, **keywords)


def resolve(node: ast.expr, known: dict[str, Any]) -> Any:
    """The object that a name means; None if it is not ours, or known only at run time."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = resolve(node.value, known)
    if inspect.ismodule(owner) and owner.__name__.startswith("csmae") and not hasattr(owner, node.attr):
        return importlib.import_module(f"{owner.__name__}.{node.attr}")
    if inspect.ismodule(owner) or owner is SensorEncoder:
        return getattr(owner, node.attr)
    return None


def test_mistakes_in_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "wrong.md"
    page.write_text("Run `python search.py spaces/masking.yaml --sampler gp`.")
    with pytest.raises(AssertionError, match="is rejected"):
        test_every_command_is_accepted(page)
    page.write_text(
        "Set `masking.rato`, say `--gpu-hour 4`, see [there](nowhere.md) and `csmae/absent.py`, `val/f2_mean`."
    )
    for check in (
        test_every_field_exists,
        test_every_option_exists,
        test_every_link_has_a_target,
        test_every_file_exists,
        test_every_metric_exists,
    ):
        with pytest.raises(AssertionError):
            check(page)
    page.write_text(
        "```yaml\nspace:\n  model.encoder_depth: {int: [4, 12]}\n```\n```python\nimport csmae\ncsmae.load(1)\n```\n"
    )
    with pytest.raises(ConfigError, match=r"model\.encoder_depth"):
        test_every_yaml_block_is_valid(page, tmp_path)
    with pytest.raises(ImportError):
        test_every_python_call_matches_its_signature(page)


def test_the_reference_is_up_to_date() -> None:
    """``make docs`` writes it."""
    done = subprocess.run(
        [sys.executable, "docs/generate_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_names_the_doctor_once() -> None:
    assert len([words for words in commands(ROOT / "README.md") if "doctor" in words[:4]]) <= 1


def test_every_metric_is_described() -> None:
    described = {name.replace("DIRECTION", direction) for name in DESCRIPTIONS for direction in DIRECTIONS}
    assert described == set(METRICS)
