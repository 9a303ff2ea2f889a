"""The program ``csmae``: every command, grouped by topic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import csmae
from csmae.cli import cluster, data, export, retrieval, schema, search, tracking, train
from csmae.cli.exit_status import BAD_INPUT
from csmae.config import ConfigError
from csmae.console.terminal import print_line, tolerate_closed_terminal, tolerate_encoding_errors

PROGRAM = "csmae"

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
app.command(rich_help_panel="Search")(schema.schema)
app.add_typer(data.app, name="data", rich_help_panel="Data")
app.command(rich_help_panel="Retrieval")(retrieval.embed)
app.command(rich_help_panel="Retrieval")(retrieval.retrieve)
app.command(rich_help_panel="Retrieval")(retrieval.evaluate)
app.command(rich_help_panel="Results")(export.export)
app.command(rich_help_panel="Results")(tracking.report)
app.command(rich_help_panel="Results")(tracking.sync)
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
    """Take the options that stand before the command."""


@tolerate_encoding_errors()
@tolerate_closed_terminal()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command line without the program's name; by default that of this process.

    Returns:
        Exit status: 0 for success, otherwise one of ``csmae.cli.exit_status``.
    """
    try:
        return int(app(args=arguments, prog_name=PROGRAM, standalone_mode=False) or 0)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
    except typer.TyperException as error:
        sys.stderr.write(_usage_error(error))
    return BAD_INPUT


def _usage_error(error: typer.TyperException) -> str:
    """One line, or nothing where Typer has shown the help instead."""
    context = getattr(error, "ctx", None)
    program = context.command_path if context else PROGRAM
    text = " ".join(error.format_message().split()).rstrip(".")
    return f"{program}: {text} (see {program} --help)\n" if text else ""
