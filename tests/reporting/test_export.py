"""The folder for a model hub: what it holds, and what cannot be exported."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from csmae import load_encoder
from csmae.cli.main import main
from csmae.encoders import SETTINGS, WEIGHTS, SensorEncoder
from csmae.model.csmae import build_model
from tests.conftest import small_config


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    config = small_config()
    metrics = {"val/f1_mean": 0.4321, "train/loss": 1.5}
    details = {"epoch": 3, "metrics": metrics, "data": "BigEarthNet v2, 50 train, 20 validation, 20 test pairs"}
    SensorEncoder.from_model(build_model(config), config).save(tmp_path / "trained", details)
    return tmp_path / "trained"


def test_an_export_holds_the_encoder_and_a_card(trained: Path) -> None:
    folder = trained.parent / "my-encoder"
    assert main(["export", str(trained), str(folder), "--license", "apache-2.0"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
    s1 = torch.randn(1, 2, 120, 120)
    torch.testing.assert_close(load_encoder(folder).encode(s1=s1).s1, load_encoder(trained).encode(s1=s1).s1)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: csmae\n")
    for text in ("# my-encoder", "| val/f1_mean | 0.4321 |", "| VV | -12.62 | 5.11591 |", "VH VV", "@article{"):
        assert text in card
    assert "train/loss" not in card
    assert "The weights are under the license `apache-2.0`." in card
    assert json.loads((folder / SETTINGS).read_text())["details"]["epoch"] == 3


def test_a_card_declares_no_license_that_nobody_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained.parent / "my-encoder"
    assert main(["export", str(trained), str(folder)]) == 0
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "license" not in front and front["library_name"] == "csmae"
    assert "mit" not in card.split("## License")[1].split("## Statistics")[0].split()
    assert "No license is declared" in card
    assert "names no license; if the owner grants one, export again with --license" in capsys.readouterr().out


def test_a_card_takes_no_archive_of_the_same_layout_for_bigearthnet(trained: Path) -> None:
    folder = trained.parent / "my-encoder"
    assert main(["export", str(trained), str(folder)]) == 0
    terms = (folder / "README.md").read_text().split("## License")[1].split("## Statistics")[0]
    assert "trained on BigEarthNet" not in terms
    assert "named after the layout of its archive: BigEarthNet itself is under CDLA-Permissive-1.0" in terms


def test_an_export_overwrites_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained), str(trained)]) == 2
    assert capsys.readouterr().err == f"{trained}: is not empty: name a new folder\n"


def test_a_damaged_encoder_is_not_exported(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / WEIGHTS).write_bytes(b"half")
    assert main(["export", str(trained), str(trained.parent / "hub")]) == 2
    assert "does not match the checksum" in capsys.readouterr().err
    assert not (trained.parent / "hub").exists()


def test_the_card_loads_the_encoder_that_it_describes(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained.parent / "my-encoder"
    assert main(["export", str(trained), str(folder), "--license", "cc-by-4.0"]) == 0
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(trained.parent)
    (address,) = re.findall(r"csmae\.load_encoder\((.+)\)", card)
    assert load_encoder(json.loads(address)).fingerprint() == load_encoder(trained).fingerprint()
    assert yaml.safe_load(card.split("---")[1])["license"] == "cc-by-4.0"
