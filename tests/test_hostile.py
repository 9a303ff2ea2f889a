"""Foreign files that try to execute code when they are read; archives and checkpoints are tested elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

import csmae
from csmae.config import ConfigError
from csmae.encoders import SETTINGS, WEIGHTS, EncoderError, SensorEncoder, load_published
from csmae.model.csmae import build_model
from csmae.settings import load_yaml
from csmae.study.study import load_study
from csmae.tracking.registry import CHECKSUM, checksum
from tests.conftest import small_config


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def encoder(folder: Path) -> Path:
    config = small_config()
    SensorEncoder.from_model(build_model(config), config).save(folder, {"epoch": 3})
    return folder


def test_the_attack_works_without_protection(marker: Path, tmp_path: Path) -> None:
    torch.save(Attack(marker), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert marker.exists()


def test_a_study_and_a_run_configuration_execute_nothing(marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"base: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ConfigError, match=r"study.yaml: is not YAML"):
        load_study(path)
    with pytest.raises(ConfigError, match=r"study.yaml: is not YAML"):
        load_yaml(path)
    assert not marker.exists()


def test_published_weights_execute_nothing(marker: Path, tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text(f"kwargs: !!python/object/apply:os.system ['touch {marker}']\n")
    torch.save({"state_dict": Attack(marker)}, tmp_path / "weights.ckpt")
    with pytest.raises(ConfigError):
        load_published(tmp_path / "weights.ckpt", tmp_path / "cfg.yaml")
    (tmp_path / "cfg.yaml").write_text("kwargs: {}\n")
    with pytest.raises(EncoderError, match="is not a published checkpoint"):
        load_published(tmp_path / "weights.ckpt", tmp_path / "cfg.yaml")
    assert not marker.exists()


def test_an_encoder_executes_nothing(marker: Path, tmp_path: Path) -> None:
    folder = encoder(tmp_path / "encoder")
    torch.save({"w": Attack(marker)}, folder / WEIGHTS)
    with pytest.raises(EncoderError):
        csmae.load_encoder(folder)
    assert not marker.exists()


def test_an_encoders_settings_execute_nothing(marker: Path, tmp_path: Path) -> None:
    folder = encoder(tmp_path / "encoder")
    settings = json.loads((folder / SETTINGS).read_text())
    settings["model"] |= {"size": f"__import__('os').system('touch {marker}')", "_target_": "os.system"}
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(EncoderError):
        csmae.load_encoder(folder)
    assert not marker.exists()


def test_a_registered_model_executes_nothing(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow itself would load this model by its pickle and its module; an intact encoder is beside them."""
    folder = encoder(tmp_path / "model")
    torch.save(Attack(marker), folder / "python_model.pkl")
    (folder / "evil.py").write_text(f"import os\nos.system('touch {marker}')\n")
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: evil\n    code: .\n    python_model: python_model.pkl\n"
    )
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri)
    client.create_registered_model("gift")
    client.create_model_version("gift", source=str(folder), tags={CHECKSUM: checksum(folder)})
    csmae.load_encoder("models:/gift/1").encode(s1=torch.zeros(1, 2, 120, 120))
    assert not marker.exists()
