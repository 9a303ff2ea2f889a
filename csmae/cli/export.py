"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csmae.console.terminal import print_line


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of an encoder, models:/… or runs:/…, or a *.ckpt of the published code beside its settings.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to create; it may exist if it is empty.")],
    title: Annotated[
        str | None,
        typer.Option("--title", metavar="TITLE", help="Title of the model card. Default: the name of the folder."),
    ] = None,
    license_id: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="License of the weights, as a model hub names it. Default: none."),
    ] = None,
) -> int:
    """Write an encoder with a model card, as a folder for a model hub."""
    from csmae.reporting.export import export_encoder

    export_encoder(source, folder, title or folder.resolve().name, license_id)
    if not license_id:
        print_line(
            f"{folder}: the model card names no license; if the owner grants one, export again with --license ID"
        )
    return 0
