"""The estimated cost compared with torch's counters."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from csmae.config import Config, Loss, Masking
from csmae.model.cost import cost
from csmae.model.csmae import CSMAE
from tests.model.test_csmae import VARIANTS, tiny

BATCH = 4

CASES = [
    (Masking(), Loss()),
    (Masking(ratio=0.75, strategy="disjoint", reconstruction="identical"), Loss(mde_weight=1)),
    (Masking(reconstruction="identical"), Loss()),
    (Masking(strategy="identical"), Loss(cmr_weight=0)),
    (Masking(), Loss(umr_weight=0, s1_weight=0)),
    (Masking(), Loss(umr_weight=0, cmr_weight=0)),
]


def images(size: int) -> tuple[Tensor, ...]:
    return torch.randn(BATCH, 2, size, size), torch.randn(BATCH, 10, size, size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("masking", "loss"), CASES)
def test_the_estimate_agrees_with_the_counters(variant: str, masking: Masking, loss: Loss) -> None:
    architecture = tiny(variant, img_size=48, embed_dim=64, decoder_embed_dim=48)
    config = Config(model=architecture, masking=masking, loss=loss)
    model = CSMAE(architecture, masking, loss)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    noise = torch.rand(2, BATCH, architecture.num_patches)
    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model(*images(48), noise[0], noise[1])["loss"]
        total.backward()
    estimate = cost(config)
    assert estimate.params == sum(p.numel() for p in model.parameters())
    assert estimate.flops == pytest.approx(counter.get_total_flops() / BATCH, rel=0.08)
    assert estimate.activation_bytes == pytest.approx(sum(kept.values()) / BATCH, rel=0.35)
