"""Images are preprocessed as in the published code: upsampled, normalized, mirrored together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from csmae.config import Data
from csmae.data.pairs import PairBatch, allocate
from csmae.data.transforms import Preprocess, Resize, resize_matrix


def random_batch(num_pairs: int, seed: int = 0) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    batch = allocate(num_pairs).batch
    batch.s1.normal_(-15, 5, generator=generator)
    for tensor in (batch.s2_10m, batch.s2_20m):
        tensor.copy_(torch.randint(0, 10_000, tensor.shape, generator=generator))
    return batch


def smooth_images(channels: int, size: int) -> Tensor:
    """Return realistic images: neighboring pixels are similar, and values reach 10,000."""
    coarse = torch.rand(2, channels, 9, 9, generator=torch.Generator().manual_seed(0)) * 10_000
    return interpolate(coarse, size=(size, size), mode="bilinear")


def naive(batch: PairBatch, flips: list[tuple[bool, bool]], size: int) -> Tensor:
    """Process each image separately with torch's interpolation; S1 before S2."""
    data = Data()
    mean, std = (
        torch.tensor(a + b).double()[:, None, None]
        for a, b in ((data.s1_mean, data.s2_mean), (data.s1_std, data.s2_std))
    )
    images = []
    for tensors, (horizontal, vertical) in zip(zip(*batch, strict=True), flips, strict=True):
        bands = [
            interpolate(t.double()[None], size=(size, size), mode="bicubic", align_corners=True)[0] for t in tensors
        ]
        image = (torch.cat(bands) - mean) / std
        image = image.flip(-1) if horizontal else image
        images.append(image.flip(-2) if vertical else image)
    return torch.stack(images)


@pytest.mark.parametrize("size", [120, 96, 64])
def test_preprocessing_interpolates_normalizes_and_mirrors_each_image(size: int) -> None:
    batch = random_batch(4)
    flips = [(False, False), (True, False), (False, True), (True, True)]
    s1, s2 = Preprocess(Data(), size)(batch, torch.tensor(flips))
    assert s1.shape == (4, 2, size, size) and s2.shape == (4, 10, size, size)
    assert (torch.cat([s1, s2], dim=1) - naive(batch, flips, size)).abs().max() < 5e-6


def test_preprocessing_without_flips_mirrors_nothing_and_does_not_change_the_batch() -> None:
    batch = random_batch(3)
    before = [tensor.clone() for tensor in batch]
    preprocess = Preprocess(Data(), 120)
    plain = preprocess(batch)
    unflipped = preprocess(batch, torch.zeros(3, 2, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(plain, unflipped, strict=True))
    preprocess(batch, torch.ones(3, 2, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(before, batch, strict=True))


@pytest.mark.parametrize("size", [120, 96])
@pytest.mark.parametrize(("sensor", "fields"), [("s1", ["s1"]), ("s2", ["s2_10m", "s2_20m"])])
def test_a_sensor_without_rows_yields_none(size: int, sensor: str, fields: list[str]) -> None:
    batch = random_batch(2)
    batch = batch._replace(**{field: getattr(batch, field)[:0] for field in fields})
    s1, s2 = Preprocess(Data(), size)(batch, torch.ones(2, 2, dtype=torch.bool))
    assert (len(s1), len(s2)) == ((0, 2) if sensor == "s1" else (2, 0))


@pytest.mark.parametrize(("source", "target"), [(60, 120), (60, 96), (60, 224), (120, 224), (120, 64), (30, 7), (5, 1)])
@pytest.mark.parametrize(("brightest", "tolerance"), [(6_000, 1e-3), (10_000, 2e-3), (65_535, 1.3e-2)])
def test_upsampling_is_bicubic_with_aligned_corners(source: int, target: int, brightest: int, tolerance: float) -> None:
    images = torch.rand(2, 3, source, source, generator=torch.Generator().manual_seed(0)).double() * brightest
    expected = interpolate(images.round(), size=(target, target), mode="bicubic", align_corners=True)
    assert (Resize(source, target)(images.round()) - expected).abs().max() < tolerance


def test_a_constant_image_stays_constant() -> None:
    assert torch.equal(
        Resize(60, 120)(torch.full((1, 1, 60, 60), 10_000.0).double()), torch.full((1, 1, 120, 120), 1e4)
    )


@settings(max_examples=40, deadline=None)
@given(source=st.integers(2, 130), target=st.integers(1, 260))
def test_the_weights_of_every_pixel_sum_to_one(source: int, target: int) -> None:
    matrix = resize_matrix(source, target)
    assert matrix.shape == (target, source)
    assert torch.allclose(matrix.sum(1), torch.ones(target).double())
    assert ((matrix != 0).sum(1) <= 4).all()


def test_the_statistics_of_the_configuration_are_used() -> None:
    data = Data(s1_mean=(1, 2), s1_std=(3, 4), s2_mean=(5,) * 10, s2_std=tuple(range(1, 11)))
    batch = random_batch(1)
    s1, s2 = Preprocess(data, 120)(batch)
    assert torch.allclose(s1[0, 1], (batch.s1[0, 1] - 2) / 4)
    assert torch.allclose(s2[0, 3], (batch.s2_10m[0, 3].float() - 5) / 4)


def test_preprocessing_adds_nothing_to_the_weights_of_an_encoder() -> None:
    assert not Preprocess(Data(), 120).state_dict()
