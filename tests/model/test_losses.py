"""Losses compared with naive versions of the papers' formulas."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csmae.model.losses import modality_discrepancy, normalize_patches, nt_xent, reconstruction_loss


def naive_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> float:
    views = normalize(torch.cat([z1, z2]).double(), dim=1).tolist()
    scenes, total = len(z1), 0.0
    for i, anchor in enumerate(views):
        similarities = [sum(a * b for a, b in zip(anchor, other, strict=True)) / temperature for other in views]
        partner = similarities[(i + scenes) % (2 * scenes)]
        total -= partner - math.log(sum(math.exp(s) for j, s in enumerate(similarities) if j != i))
    return total / len(views)


def test_nt_xent_is_the_mean_over_all_anchors() -> None:
    z1, z2 = torch.randn(2, 7, 16)
    for temperature in (0.05, 0.5, 2.0):
        assert math.isclose(float(nt_xent(z1, z2, temperature)), naive_nt_xent(z1, z2, temperature), rel_tol=1e-5)


def test_nt_xent_stays_finite_in_half_precision_at_a_low_temperature() -> None:
    z = torch.randn(2, 32, 16).half() * 100
    assert math.isfinite(float(nt_xent(z[0], z[1], 0.01)))


def test_nt_xent_is_computed_in_float32_under_autocast() -> None:
    z = torch.randn(2, 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = nt_xent(z[0], z[1], 0.05)
    assert half.dtype is torch.float32
    assert torch.equal(half, nt_xent(z[0], z[1], 0.05))


def test_modality_discrepancy_is_the_mean_of_the_softplus_of_the_cosine() -> None:
    z1, z2 = torch.randn(2, 5, 8)
    cosines = (normalize(z1, dim=1) * normalize(z2, dim=1)).sum(1).tolist()
    expected = -sum(math.log(1 + math.exp(c)) for c in cosines) / len(cosines)
    assert math.isclose(float(modality_discrepancy(z1, z2)), expected, rel_tol=1e-5)


def test_reconstruction_loss_is_the_mean_of_the_patches_errors() -> None:
    predicted, target = torch.randn(2, 3, 4, 5)
    errors = [float(((p - t) ** 2).mean()) for p, t in zip(predicted.flatten(0, 1), target.flatten(0, 1), strict=True)]
    assert math.isclose(float(reconstruction_loss(predicted, target)), sum(errors) / len(errors), rel_tol=1e-5)


def test_a_normalized_patch_has_mean_0_and_unbiased_variance_1() -> None:
    patches = normalize_patches(torch.randn(2, 3, 50) * 7 + 3)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(-1), torch.ones(2, 3), atol=1e-4, rtol=0)
