"""The encoder that users take home: what it accepts, and one clear error for what is not it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import small_config
from csmae import load_encoder
from csmae.encoders import SETTINGS, WEIGHTS, EncoderError, SensorEncoder, load_published
from csmae.training.scoring import encoder_of, seeded_model


@pytest.fixture
def encoder() -> SensorEncoder:
    config = small_config()
    return encoder_of(seeded_model(config), config)


@pytest.fixture
def folder(encoder: SensorEncoder, tmp_path: Path) -> Path:
    encoder.save(tmp_path / "encoder", {"epoch": 3})
    return tmp_path / "encoder"


def test_both_sensors_together_give_what_each_gives_alone(encoder: SensorEncoder) -> None:
    s1, s2 = torch.randn(3, 2, 120, 120), torch.rand(3, 10, 120, 120) * 4000
    both, only_s1, only_s2 = encoder.encode(s1=s1, s2=s2), encoder.encode(s1=s1), encoder.encode(s2=s2)
    assert only_s1.s2 is None
    assert only_s2.s1 is None
    torch.testing.assert_close(both.s1, only_s1.s1)
    torch.testing.assert_close(both.s2, only_s2.s2)


def test_integers_and_arrays_are_as_good_as_tensors(encoder: SensorEncoder) -> None:
    s2 = np.random.default_rng(0).integers(0, 5000, (2, 10, 120, 120), dtype=np.uint16)
    torch.testing.assert_close(encoder.encode(s2=s2).s2, encoder.encode(s2=torch.from_numpy(s2).float()).s2)


def test_images_of_another_size_are_resized(encoder: SensorEncoder) -> None:
    s1 = torch.full((1, 2, 60, 60), -12.0)
    torch.testing.assert_close(encoder.encode(s1=s1).s1, encoder.encode(s1=torch.full((1, 2, 120, 120), -12.0)).s1)


@pytest.mark.parametrize("shape", [(2, 120, 120), (1, 10, 120, 120), (1, 2, 120, 60)])
def test_an_image_of_the_wrong_shape_is_refused(encoder: SensorEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=r"s1 must be \(batch, 2, side, side\) in the order VH VV, found"):
        encoder.encode(s1=torch.zeros(shape))


def test_no_image_is_refused(encoder: SensorEncoder) -> None:
    with pytest.raises(EncoderError, match="give s1=, s2= or both"):
        encoder.encode()


def test_a_saved_encoder_says_what_it_is(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    assert settings["bands"] == {
        "s1": ["VH", "VV"],
        "s2": ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B11", "B12", "B8A"],
    }
    assert len(settings["statistics"]["s2_mean"]) == 10
    assert settings["model"]["patch_size"] == 30
    assert settings["details"] == {"epoch": 3}
    assert load_encoder(str(folder)).model.patch_size == 30


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (WEIGHTS, b"", "does not match the checksum"),
        (WEIGHTS, None, "encoder.safetensors: cannot be read"),
        (SETTINGS, None, "config.json: cannot be read"),
        (SETTINGS, b"{", "config.json: is not JSON"),
        (SETTINGS, b"[]", "is no csmae-encoder of version 1"),
        (SETTINGS, b'{"format": "csmae-encoder", "version": 2}', "is no csmae-encoder of version 1"),
        (SETTINGS, b'{"format": "csmae-encoder", "version": 1}', "lacks bands, model, sha256"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, name: str, content: bytes | None, text: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(EncoderError, match=text):
        load_encoder(folder)


def test_settings_that_do_not_fit_the_weights_are_refused(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    settings["model"]["embed_dim"] = 48
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(EncoderError, match="do not fit together"):
        load_encoder(folder)


def test_an_encoder_of_other_bands_is_refused(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    settings["bands"]["s1"] = ["VV", "VH"]
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(EncoderError, match="is for other bands"):
        load_encoder(folder)


def test_a_file_that_holds_no_published_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text("kwargs: {}\n")
    (tmp_path / "weights.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(EncoderError, match="is no published checkpoint"):
        load_published(tmp_path / "weights.ckpt", tmp_path / "cfg.yaml")
