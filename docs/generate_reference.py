"""Writes docs/reference from the code: ``make docs``. With ``--check`` it only reports pages that are out of date.

The pages on settings, metrics and commands are lists rather than wide tables, so that they read well in a terminal, too.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic.fields import FieldInfo
from typer.main import get_command

from csmae.cli.main import PROGRAM, app
from csmae.config import Config, MayChange, Section
from csmae.study.metrics import DESCRIPTIONS
from csmae.study.options import Search

REFERENCE = Path(__file__).parent / "reference"

WIDTH = 120

NOTICE = "<!-- Generated from the code by `make docs`; do not edit. -->"

TYPE_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}

CHANGE_NOTES = {
    MayChange.ON_STUDY_RESUME: "may change when a study or a training resumes",
    MayChange.ON_TRAINING_RESUME: "may change when a training resumes, not within a study",
    MayChange.IF_LARGER: "may become larger when a study or a training resumes",
    MayChange.ON_CHECKPOINT_COPY: "copies may change it",
    MayChange.NEVER: "fixed within a study",
}

CONFIGURATION = """\
# Configuration

Every field of a training. In a YAML file the fields are grouped in sections:

```yaml
masking:
  ratio: 0.6
```

Everywhere else, a field has its dotted name: `--set masking.ratio=0.6`, a key of a search space, a parameter in Optuna and
MLflow. The defaults are those of the published SESD model. A configuration is checked as a whole; an unknown field is an
error. A study or a training that resumes must keep the values of all fields, except where the list says otherwise. *Copies may
change it* means a trial that starts from a copy of another trial's checkpoint.
"""

SEARCH = """\
# Search settings

The section `search` of a study file. On the command line, `--set` overrides a field. The values may change
when a study resumes, except where the list says otherwise.
"""

METRICS = """\
# Metrics

What an epoch of a training reports, by the name that `search.objectives` and `search.constraints` use and that MLflow shows.
Scores (`val/…`) are computed within the validation split, in the epochs that `eval.every` selects. A DIRECTION is one of
`s1_to_s1`, `s1_to_s2`, `s2_to_s1` and `s2_to_s2`: the sensor of the queries and that of the retrieved images. A loss term is
reported only if its weight is not 0. Costs are known before a training starts.
"""

COMMANDS = f"""\
# Commands

`--help` after a command prints the same. `{PROGRAM} --install-completion` installs completion for your shell. Exit status: 0
for success, 1 when a command found something wrong, 2 for bad input, 130 when interrupted.
"""


def main() -> int:
    """Write the pages, or check them; returns the exit status."""
    pages = {
        "configuration.md": configuration(),
        "search.md": "\n".join([SEARCH, *fields(Search, "search.", Search.may_change)]),
        "metrics.md": metrics(),
        "commands.md": commands(),
    }
    outdated = []
    for name, text in pages.items():
        path, content = REFERENCE / name, re.sub(r"\n{3,}", "\n\n", f"{NOTICE}\n\n{text.rstrip()}\n")
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            outdated.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(content, encoding="utf-8")
    if "--check" in sys.argv and outdated:
        sys.stderr.write(f"docs/reference is out of date ({', '.join(outdated)}): run `make docs`\n")
        return 1
    return 0


def configuration() -> str:
    """The page on all fields of a training."""
    lines = [CONFIGURATION]
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        text = wrapped(markdown(section.__doc__))
        lines += [f"## {name}", "", text, "", *fields(section, f"{name}.", Config.may_change), ""]
    return "\n".join(lines)


def fields(section: type[Section], prefix: str, usual: MayChange) -> Iterator[str]:
    """One item for each field, those of sections within included; ``usual`` is the mark of which the page speaks."""
    for name, field in section.model_fields.items():
        inner = next((part for part in flat(field.annotation) if is_section(part)), None)
        details = "; ".join(filter(None, [description(field), change_note(section, field, usual)]))
        yield item(f"{prefix}{name}", f" ({details})", field.description)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.", inner.may_change)


def is_section(part: Any) -> bool:
    """Whether a type is a section of fields."""
    return isinstance(part, type) and issubclass(part, Section)


def change_note(section: type[Section], field: FieldInfo, usual: MayChange) -> str:
    """When a field may change; nothing where the page says so of its fields in general."""
    mark = next((item for item in field.metadata if isinstance(item, MayChange)), section.may_change)
    return "" if mark is usual else CHANGE_NOTES[mark]


def description(field: FieldInfo) -> str:
    """Type, range and default of a field."""
    limits = [f"{sign} {value:g}" for name, sign in BOUNDS.items() for value in bounds(field, name)]
    first, *others = dict.fromkeys(kinds(field.annotation))
    bounded = f"{first} {' and '.join(limits)}" if limits else first
    kind = " or ".join([bounded, *others])
    return f"{kind}, default: {shown(field.get_default(call_default_factory=True))}"


def bounds(field: FieldInfo, name: str) -> list[float]:
    """Values of one kind of bound, such as ``gt``."""
    return [getattr(item, name) for item in field.metadata if getattr(item, name, None) is not None]


def flat(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from flat(part)
    elif get_origin(annotation) is Annotated:
        yield from flat(get_args(annotation)[0])
    else:
        yield annotation


def kinds(annotation: Any) -> Iterator[str]:
    """A type in words."""
    for part in flat(annotation):
        origin = get_origin(part)
        if origin is Literal:
            yield f"one of {', '.join(f'`{value}`' for value in get_args(part))}"
        elif origin in (list, tuple):
            yield f"list of {next(kinds(get_args(part)[0]))}s"
        elif part is dict or origin is dict:
            yield "mapping"
        else:
            yield "section" if is_section(part) else TYPE_NAMES[part]


def shown(value: Any) -> str:
    """A default as YAML shows it."""
    if isinstance(value, Section):
        return "its fields' defaults"
    if isinstance(value, tuple):
        value = [float(f"{number:.6g}") for number in value]
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).removesuffix("\n...\n").strip()
    return f"`{text}`"


def item(name: str, details: str, text: str | None) -> str:
    """An item of a list."""
    return wrapped(f"- `{name}`{details}: {markdown(text)}", indent="  ")


def wrapped(text: str, indent: str = "") -> str:
    """Wrap a paragraph, but no code in it."""
    whole = re.sub(r"`.+?`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.fill(whole, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def markdown(text: str | None) -> str:
    """A docstring as Markdown, in one paragraph."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(inspect.cleandoc(text or "").split()))


def metrics() -> str:
    """The page on metrics."""
    lines = [METRICS]
    for name, (text, unit) in DESCRIPTIONS.items():
        lines.append(item(name, f" ({unit})" if unit else "", text))
    return "\n".join(lines)


def commands() -> str:
    """The page on commands."""
    program: Any = get_command(app)
    lines = [COMMANDS, *options(program), ""]
    panels: dict[str, list[Any]] = {}
    for command in program.commands.values():
        panels.setdefault(command.rich_help_panel, []).append(command)
    for panel, members in panels.items():
        lines += [f"## {panel}", ""]
        for command in members:
            lines += section(command, f"{PROGRAM} {command.name}")
    return "\n".join(lines)


def section(command: Any, path: str) -> Iterator[str]:
    """A command with its arguments and options, or a group with its commands."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    if hasattr(command, "commands"):
        for inner in command.commands.values():
            yield from section(inner, f"{path} {inner.name}")
        return
    yield f"### {path}"
    yield ""
    words = [path, *(argument_name(command, argument) for argument in arguments), "[OPTIONS]"]
    yield f"```text\n{' '.join(words)}\n```"
    yield ""
    yield wrapped(markdown(command.help))
    yield ""
    for argument in arguments:
        yield item(argument_name(command, argument), "", argument.help)
    yield from options(command)
    yield ""


def value_name(command: Any, parameter: Any) -> str:
    """The value of a parameter in a command line: its choices, or a placeholder."""
    hints = get_type_hints(inspect.unwrap(command.callback))
    choices = [value for part in flat(hints[parameter.name]) if get_origin(part) is Literal for value in get_args(part)]
    return "|".join(choices) or str(parameter.metavar)


def argument_name(command: Any, argument: Any) -> str:
    """An argument in a command line; an optional one is in brackets."""
    name = value_name(command, argument)
    return name if argument.required else f"[{name}]"


def options(command: Any) -> Iterator[str]:
    """One item for each option."""
    for option in command.params:
        if option.param_type_name != "option" or option.name == "help":
            continue
        value = "" if option.is_flag else f" {value_name(command, option)}"
        notes = ["required"] if option.required else []
        if option.default not in (None, False) and not option.is_flag:
            default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
            notes.append(f"default: {default}")
        yield item(f"{option.opts[0]}{value}", f" ({notes[0]})" if notes else "", option.help)


if __name__ == "__main__":
    sys.exit(main())
