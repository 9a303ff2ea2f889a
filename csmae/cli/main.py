"""The program ``csmae``: every command, grouped by topic."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

import csmae
from csmae.cli import cluster, data, results, retrieval, search, train
from csmae.cli.exit_status import BAD_INPUT, INTERRUPTED
from csmae.config import ConfigError
from csmae.console.terminal import print_line, tolerate_closed_terminal, tolerate_encoding_errors

PROGRAM = "csmae"

COMPLETION = "_CSMAE_COMPLETE"
"""Environment variable in which a shell asks for completions."""

app = typer.Typer(
    name=PROGRAM,
    help="Search, train and use cross-sensor masked autoencoders (CSMAE) for Sentinel-1 and Sentinel-2.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(rich_help_panel="Search")(search.search)
app.command(rich_help_panel="Search")(train.train)
app.command(rich_help_panel="Search")(search.schema)
app.add_typer(data.app, name="data", rich_help_panel="Data")
app.command(rich_help_panel="Retrieval")(retrieval.embed)
app.command(rich_help_panel="Retrieval")(retrieval.retrieve)
app.command(rich_help_panel="Retrieval")(retrieval.evaluate)
app.command(rich_help_panel="Results")(results.export)
app.command(rich_help_panel="Results")(results.report)
app.command(rich_help_panel="Results")(results.sync)
app.command(rich_help_panel="Cluster")(cluster.doctor)
app.command(rich_help_panel="Cluster")(cluster.preemption_notice)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_line(f"{PROGRAM} {csmae.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that precede the command."""


@tolerate_encoding_errors()
@tolerate_closed_terminal()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command line without the program's name; by default that of this process.

    Returns:
        Exit status: 0 for success, otherwise one of ``csmae.cli.exit_status``.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    if os.environ.get(COMPLETION):  # set by a shell that completes a command line
        app(prog_name=PROGRAM)
    command = get_command(app)
    try:
        # app() would hide errors of the command: it turns EPIPE into a silent status 1, and an EOFError into an Abort
        with command.make_context(PROGRAM, list(words)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
    except typer.TyperException as error:
        sys.stderr.write(_usage_error(error, _command_path(words)))
    return BAD_INPUT


def _usage_error(error: typer.TyperException, program: str) -> str:
    """One line, or nothing where Typer has shown the help instead."""
    text = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "", 1)
    return f"{program}: {text} (see {program} --help)\n" if text else ""


def _command_path(words: Sequence[str]) -> str:
    """The program and the command that a command line begins with, which not every usage error knows."""
    path, commands = [PROGRAM], getattr(get_command(app), "commands", {})
    for word in words:
        if word not in commands:
            break
        path.append(word)
        commands = getattr(commands[word], "commands", {})
    return " ".join(path)
