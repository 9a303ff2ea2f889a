"""The encoder's inputs, its folder, fine-tuning and export, and one clear error for everything else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from csmae import load_encoder
from csmae.encoders import SETTINGS, WEIGHTS, EncoderError, SensorEncoder, load_published
from csmae.model.csmae import build_model
from tests.conftest import small_config


@pytest.fixture
def encoder() -> SensorEncoder:
    config = small_config()
    return SensorEncoder.from_model(build_model(config), config)


@pytest.fixture
def folder(encoder: SensorEncoder, tmp_path: Path) -> Path:
    encoder.save(tmp_path / "encoder", {"epoch": 3})
    return tmp_path / "encoder"


def test_encoding_both_sensors_equals_encoding_each_alone(encoder: SensorEncoder) -> None:
    s1, s2 = torch.randn(3, 2, 120, 120), torch.rand(3, 10, 120, 120) * 4000
    both, only_s1, only_s2 = encoder.encode(s1=s1, s2=s2), encoder.encode(s1=s1), encoder.encode(s2=s2)
    assert only_s1.s2 is None
    assert only_s2.s1 is None
    torch.testing.assert_close(both.s1, only_s1.s1)
    torch.testing.assert_close(both.s2, only_s2.s2)


def test_integers_and_arrays_are_accepted_like_tensors(encoder: SensorEncoder) -> None:
    s2 = np.random.default_rng(0).integers(0, 5000, (2, 10, 120, 120), dtype=np.uint16)
    torch.testing.assert_close(encoder.encode(s2=s2).s2, encoder.encode(s2=torch.from_numpy(s2).float()).s2)


def test_images_of_another_size_are_resized(encoder: SensorEncoder) -> None:
    s1 = torch.full((1, 2, 60, 60), -12.0)
    torch.testing.assert_close(encoder.encode(s1=s1).s1, encoder.encode(s1=torch.full((1, 2, 120, 120), -12.0)).s1)


@pytest.mark.parametrize("shape", [(2, 120, 120), (1, 10, 120, 120), (1, 2, 120, 60)])
def test_an_image_of_the_wrong_shape_is_rejected(encoder: SensorEncoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(EncoderError, match=r"s1 must be \(batch, 2, side, side\) in the order VH VV, found"):
        encoder.encode(s1=torch.zeros(shape))


def test_encoding_without_an_image_is_rejected(encoder: SensorEncoder) -> None:
    with pytest.raises(EncoderError, match="pass s1=, s2= or both"):
        encoder.encode()


def test_a_saved_encoder_describes_itself(folder: Path) -> None:
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
        (WEIGHTS, None, "encoder.safetensors: cannot be read: No such file or directory: download it again"),
        (SETTINGS, None, "config.json: cannot be read: No such file or directory: pass an encoder's folder"),
        (SETTINGS, b"{", "config.json: is not JSON"),
        (SETTINGS, b"[]", "is not a csmae-encoder of version 1"),
        (SETTINGS, b'{"format": "csmae-encoder", "version": 2}', "is not a csmae-encoder of version 1"),
        (SETTINGS, b'{"format": "csmae-encoder", "version": 1}', "lacks bands, model, sha256"),
    ],
)
def test_a_damaged_folder_is_rejected(folder: Path, name: str, content: bytes | None, text: str) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(EncoderError, match=text):
        load_encoder(folder)


def test_settings_that_do_not_match_the_weights_are_rejected(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    settings["model"]["embed_dim"] = 48
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(EncoderError, match=r"do not match: .*: download the folder again"):
        load_encoder(folder)


def test_an_encoder_for_other_bands_is_rejected(folder: Path) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    settings["bands"]["s1"] = ["VV", "VH"]
    (folder / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(EncoderError, match=r"is for other bands: .*: pass an encoder for these"):
        load_encoder(folder)


def test_a_file_without_published_weights_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text("kwargs: {}\n")
    (tmp_path / "weights.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(EncoderError, match=r"is not a published checkpoint \(.+\): pass a complete weights\.ckpt"):
        load_published(tmp_path / "weights.ckpt", tmp_path / "cfg.yaml")
    with pytest.raises(
        EncoderError, match=r"none\.ckpt: cannot be read: No such file or directory: pass a complete weights"
    ):
        load_published(tmp_path / "none.ckpt", tmp_path / "cfg.yaml")


def images(num: int, side: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(num)
    return torch.randn(num, 2, side, side) * 5 - 15, torch.rand(num, 10, side, side) * 4000


def test_calling_the_encoder_returns_what_encode_returns(encoder: SensorEncoder) -> None:
    s1, s2 = images(3)
    called, encoded = encoder(s1=s1, s2=s2), encoder.encode(s1=s1.numpy(), s2=s2.numpy())
    for sensor, feature in encoded._asdict().items():
        assert torch.equal(called[sensor], feature)
        assert called[sensor].requires_grad
        assert not feature.requires_grad


def test_batches_of_different_sizes_are_not_mixed_up(encoder: SensorEncoder) -> None:
    s1, s2 = images(5)
    both = encoder.encode(s1=s1[:2], s2=s2)
    torch.testing.assert_close(both.s1, encoder.encode(s1=s1[:2]).s1)
    torch.testing.assert_close(both.s2, encoder.encode(s2=s2).s2)


@pytest.mark.parametrize("side", [120, 60])
@pytest.mark.parametrize("given", [("s1",), ("s1", "s2")])
def test_an_exported_encoder_accepts_batches_of_any_size(
    encoder: SensorEncoder, given: tuple[str, ...], side: int
) -> None:
    batch = torch.export.Dim("batch")
    example = {sensor: image for sensor, image in zip(("s1", "s2"), images(3, side), strict=True) if sensor in given}
    shapes = {sensor: {0: batch} for sensor in given}
    program = torch.export.export(encoder.eval(), (), example, dynamic_shapes=shapes, strict=False).module()
    for num in (1, 2, 7):
        new = {s: image for s, image in zip(("s1", "s2"), images(num, side), strict=True) if s in given}
        expected = encoder.encode(**new)
        for sensor in given:
            found = program(**new)[sensor]
            torch.testing.assert_close(found, getattr(expected, sensor), rtol=1e-4, atol=1e-4)


def test_a_loaded_encoder_can_be_fine_tuned(folder: Path) -> None:
    """In a few steps on one batch, every weight that the sensor uses changes and the loss falls."""
    encoder = load_encoder(folder).train()
    head = torch.nn.Linear(encoder.width, 19)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    s2, labels = images(4)[1], torch.eye(19)[:4]
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(encoder(s2=s2)["s2"]), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    same = {name for name, p in encoder.named_parameters() if torch.equal(p, before[name])}
    assert same and all("s1" in name for name in same), "only the weights of S1 are unchanged"


def s1_features(folder: Path, s1: torch.Tensor) -> torch.Tensor:
    feature = load_encoder(folder).encode(s1=s1).s1
    assert feature is not None
    return feature


def test_a_fine_tuned_encoder_is_saved_and_loaded_like_any_other(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(folder)
    s1 = images(2)[0]
    torch.nn.functional.mse_loss(encoder(s1=s1)["s1"], torch.zeros(2, encoder.width)).backward()
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    encoder.save(tmp_path / "tuned")
    assert torch.equal(s1_features(tmp_path / "tuned", s1), encoder(s1=s1)["s1"])
    assert not torch.equal(s1_features(folder, s1), encoder(s1=s1)["s1"])


@pytest.mark.parametrize("side", [120, 60])
def test_a_gradient_reaches_the_image(encoder: SensorEncoder, side: int) -> None:
    s1 = images(1, side)[0].requires_grad_()
    encoder(s1=s1)["s1"][:, 0].sum().backward()
    assert s1.grad is not None
    assert s1.grad.abs().sum() > 0


def test_the_documented_fine_tuning_and_export_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "use-an-encoder.md").read_text()
    (block,) = (part.partition("```")[0] for part in text.split("```python\n")[1:] if "fine-tuned" in part)
    block = block.replace("models:/csmae-encoder@champion", str(folder))
    monkeypatch.chdir(tmp_path)
    labels = torch.eye(19)[:2]
    exec(block, {"loader": [(images(2)[1], labels)] * 2})
    assert load_encoder(tmp_path / "fine-tuned").width == 96
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    s2 = images(3)[1]
    tuned = load_encoder(tmp_path / "fine-tuned").encode(s2=s2)
    torch.testing.assert_close(program(s2=s2)["s2"], tuned.s2, rtol=1e-4, atol=1e-4)
