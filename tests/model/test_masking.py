"""Masks for every ratio of removed patches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from csmae.config import Masking
from csmae.model.masking import draw_masks

noise = st.integers(0, 2**32).map(lambda seed: torch.rand(2, 3, 64, generator=torch.Generator().manual_seed(seed)))
ratios = st.floats(0.02, 0.98)
strategies = st.sampled_from(["identical", "random", "disjoint"])


def visible(keep_bk: Tensor) -> list[set[int]]:
    return [set(row.tolist()) for row in keep_bk]


@given(noise, ratios, strategies)
def test_every_patch_is_either_visible_or_removed(noise: Tensor, ratio: float, strategy: str) -> None:
    for mask in draw_masks(noise[0], noise[1], Masking(ratio=ratio, strategy=strategy)).values():
        both = torch.cat([mask.ids_keep_bk, mask.ids_removed_bm], dim=1)
        assert both.sort(dim=1).values.tolist() == [list(range(64))] * 3
        assert mask.mask_bl.sum(1).tolist() == [mask.ids_removed_bm.shape[1]] * 3
        assert both.gather(1, mask.ids_restore_bl).tolist() == [list(range(64))] * 3


@given(noise, ratios)
def test_s1_keeps_the_fraction_that_the_ratio_leaves(noise: Tensor, ratio: float) -> None:
    for strategy in ("identical", "random", "disjoint"):
        mask = draw_masks(noise[0], noise[1], Masking(ratio=ratio, strategy=strategy))["s1"]
        assert mask.ids_keep_bk.shape[1] == int(64 * (1 - ratio))


@given(noise, ratios)
def test_disjoint_masks_cover_every_patch_once(noise: Tensor, ratio: float) -> None:
    masks = draw_masks(noise[0], noise[1], Masking(ratio=ratio, strategy="disjoint"))
    for s1, s2 in zip(visible(masks["s1"].ids_keep_bk), visible(masks["s2"].ids_keep_bk), strict=True):
        assert s1 | s2 == set(range(64))
        assert not s1 & s2


def test_identical_masks_are_the_same_and_random_ones_are_not() -> None:
    noise = torch.rand(2, 8, 64)
    same = draw_masks(noise[0], noise[1], Masking(strategy="identical"))
    assert visible(same["s1"].ids_keep_bk) == visible(same["s2"].ids_keep_bk)
    drawn = draw_masks(noise[0], noise[1], Masking(strategy="random"))
    assert visible(drawn["s1"].ids_keep_bk) != visible(drawn["s2"].ids_keep_bk)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_smallest_noise_is_visible(ratio: float) -> None:
    noise = torch.rand(2, 1, 64)
    mask = draw_masks(noise[0], noise[1], Masking(ratio=ratio))["s1"]
    assert noise[0, 0, mask.ids_keep_bk[0]].max() <= noise[0, 0, mask.ids_removed_bm[0]].min()
