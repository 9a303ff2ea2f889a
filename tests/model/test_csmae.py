"""The network: every configuration trains, no parameter is unused, no term of weight 0 is computed."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from csmae.config import ConfigError, Loss, Masking, Model
from csmae.model.csmae import CSMAE
from csmae.model.decoder import Decoder
from csmae.model.patches import patchify, unpatchify
from csmae.settings import parse_config

TINY = {
    "img_size": 24,
    "patch_size": 6,
    "embed_dim": 16,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
DEPTHS = {"ce": {"sensor_depth": 0, "cross_depth": 2}, "se": {"sensor_depth": 1, "cross_depth": 1}}
VARIANTS = ("cecd", "cesd", "secd", "sesd")
WEIGHTS = ("umr_weight", "cmr_weight", "mim_weight", "mde_weight", "s1_weight")


def tiny(variant: str, **more: object) -> Model:
    return Model.model_validate({"variant": variant, **TINY, **DEPTHS[variant[:2]], **more})


def batch(seed: int = 0, size: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 2, 24, 24, generator=g), torch.randn(size, 10, 24, 24, generator=g)
    return *images, torch.rand(size, 16, generator=g), torch.rand(size, 16, generator=g)


def valid_losses() -> list[Loss]:
    losses = []
    for on in itertools.product((0.0, 1.0), repeat=len(WEIGHTS)):
        try:
            parse_config({"loss": dict(zip(WEIGHTS, on, strict=True))}, "test")
        except ConfigError:
            continue
        losses.append(Loss(**dict(zip(WEIGHTS, on, strict=True))))
    return losses


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pooling", ["avg", "cls"])
def test_every_trainable_parameter_has_a_gradient_for_all_combinations_of_losses(variant: str, pooling: str) -> None:
    losses = valid_losses()
    assert len(losses) > 20
    for loss in losses:
        model = CSMAE(tiny(variant, pooling=pooling), Masking(), loss)
        model(*batch())["loss"].backward()
        unused = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not unused, (loss, unused)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", ["identical", "random", "disjoint"])
@pytest.mark.parametrize("reconstruction", ["identical", "disjoint"])
def test_every_masking_and_reconstruction_trains(variant: str, strategy: str, reconstruction: str) -> None:
    masking = Masking(ratio=0.7, strategy=strategy, reconstruction=reconstruction)
    model = CSMAE(tiny(variant), masking, Loss(mde_weight=1.0))
    terms = model(*batch())
    assert set(terms) == {"loss", "umr_s1", "umr_s2", "cmr_s1_to_s2", "cmr_s2_to_s1", "mim", "mde"}
    assert all(term.isfinite() for term in terms.values())
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    loss = Loss(umr_weight=2, cmr_weight=3, mim_weight=5, mde_weight=7, s1_weight=11)
    t = CSMAE(tiny("sesd"), Masking(), loss)(*batch())
    expected = 2 * (11 * t["umr_s1"] + t["umr_s2"]) + 3 * (t["cmr_s1_to_s2"] + 11 * t["cmr_s2_to_s1"])
    torch.testing.assert_close(t["loss"], expected + 5 * t["mim"] + 7 * t["mde"])


def test_reconstruction_of_identical_patches_measures_those_visible_in_the_source() -> None:
    inputs = batch()
    model = CSMAE(tiny("sesd"), Masking(reconstruction="identical"), Loss())
    terms, output = model(*inputs), model.reconstruct(*inputs)
    removed = output.masks["s1"].mask_bl.bool()
    error = (output.predictions["s1", "s2"] - patchify(inputs[1], 6)).square().mean(-1)
    torch.testing.assert_close(terms["cmr_s1_to_s2"], error[~removed].mean())


def test_a_term_of_weight_0_is_not_computed() -> None:
    class Calls:
        count = 0

        def __call__(self, module: nn.Module, args: object, output: object) -> None:
            self.count += 1

    calls = Calls()
    model = CSMAE(tiny("cecd"), Masking(), Loss())
    for module in model.modules():
        if isinstance(module, Decoder):
            module.register_forward_hook(calls)
    model(*batch())
    assert calls.count == 1, "a common decoder processes both sources in one batch"
    assert not CSMAE(tiny("cecd"), Masking(), Loss(umr_weight=0, cmr_weight=0)).decoders
    assert set(model(*batch())) == {"loss", "umr_s1", "umr_s2", "cmr_s1_to_s2", "cmr_s2_to_s1", "mim"}


def test_inference_is_deterministic_and_independent_of_the_other_sensor() -> None:
    s1, s2, _, _ = batch()
    encoder = CSMAE(tiny("secd"), Masking(), Loss()).encoder
    both = encoder.features({"s1": s1, "s2": s2})
    torch.testing.assert_close(encoder.features({"s1": s1})["s1"], both["s1"])
    torch.testing.assert_close(encoder.features({"s2": s2})["s2"], both["s2"])
    assert torch.equal(encoder.features({"s2": s2})["s2"], encoder.features({"s2": s2})["s2"])


def test_unpatchify_undoes_patchify() -> None:
    image = torch.randn(2, 10, 24, 24)
    assert torch.equal(unpatchify(patchify(image, 6), 6), image)
