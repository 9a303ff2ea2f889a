"""Options and arguments that several commands share: each has one name and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from csmae.config import ConfigError, Data
from csmae.sensors import SENSORS

StudyFile = Annotated[
    Path | None,
    typer.Argument(metavar="STUDY.yaml", help="Study file: YAML with the sections base, space and search."),
]

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Name of the study.")]

Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one field, such as optim.lr=1e-4 or, in a study, search.sampler=gp. Repeat it for several fields.",
    ),
]

Storage = Annotated[
    str,
    typer.Option(
        "--storage", metavar="FOLDER|URL", help="Storage of all studies: a folder, s3://BUCKET/… or gs://BUCKET/…"
    ),
]

MlflowUri = Annotated[
    str | None,
    typer.Option(
        "--mlflow-uri",
        metavar="URI",
        help="MLflow tracking URI. Default: MLFLOW_TRACKING_URI, or mlflow.db in the storage. "
        "With --logger wandb: PROJECT or ENTITY/PROJECT.",
    ),
]

Logger = Annotated[
    Literal["mlflow", "wandb"], typer.Option("--logger", help="Where to show trials: MLflow or Weights & Biases.")
]

_ADDRESS = typer.Option(
    "--address", metavar="ADDRESS", help="Address of the Ray cluster: HOST:PORT, or auto on one of its nodes."
)
Address = Annotated[str | None, _ADDRESS]
ClusterAddress = Annotated[str, _ADDRESS]

Archive = Annotated[str, typer.Argument(metavar="ARCHIVE", help="Folder of a BigEarthNet archive, or synthetic.")]

SplitsDir = Annotated[
    str | None,
    typer.Option(
        "--splits-dir",
        metavar="FOLDER",
        help="Folder of train.csv, val.csv and test.csv that replace the archive's splits.",
    ),
]

OnError = Annotated[
    Literal["raise", "skip"],
    typer.Option("--on-error", help="What to do with a damaged pair: raise an error, or skip it."),
]

Split = Annotated[Literal["train", "validation", "test"], typer.Option("--split", help="Split to read.")]

_SENSOR = typer.Option("--sensor", help="Sensor of the images.")
Sensors = Annotated[Literal["s1", "s2", "both"], _SENSOR]
QuerySensor = Annotated[Literal["s1", "s2"], _SENSOR]

Encoder = Annotated[
    str,
    typer.Option(
        "--encoder",
        metavar="ENCODER",
        help="Folder of an encoder, an MLflow model such as models:/csmae-encoder@champion, or the ID of a run.",
    ),
]

Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="Torch device, such as cuda:0. Default: a GPU if there is one."),
]

NumRetrieved = Annotated[int, typer.Option("--k", metavar="K", help="Scenes to retrieve for each query.")]

Picture = Annotated[Path, typer.Option("--output", metavar="FILE", help="Picture to write, a PNG file.")]


def data_settings(archive: str, splits_dir: str | None, on_error: Literal["raise", "skip"]) -> Data:
    """The configuration's section ``data`` for an archive that the options name.

    Raises:
        ConfigError: The archive's name is empty.
    """
    if not archive:
        raise ConfigError("data.path must name a folder, or be synthetic: found nothing")
    return Data(path=archive, splits_dir=splits_dir, on_error=on_error)


def chosen_sensors(choice: Literal["s1", "s2", "both"]) -> tuple[str, ...]:
    """The sensors that ``--sensor`` names."""
    return SENSORS if choice == "both" else (choice,)
