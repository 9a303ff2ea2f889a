"""What a configuration costs, counted from its shapes: nothing is built or run."""

from __future__ import annotations

from typing import NamedTuple

from csmae.config import Config, Model
from csmae.model.encoder import NUM_CHANNELS

BACKWARD = 2
"""FLOPs of the backward pass over those of the forward one, where inputs need gradients too."""

FLOAT = 4
"""Bytes of a float32."""


class Cost(NamedTuple):
    """Cost of one pretraining configuration."""

    params: int
    """Parameters of encoder and decoders, trained or not."""
    flops: int
    """Floating-point operations of a training step (forward and backward) for one pair; a multiply-add counts two."""
    activation_bytes: int
    """Estimate of what the forward pass keeps for the backward one, for one pair in float32."""


class _Tally:
    """Adds up layers."""

    def __init__(self) -> None:
        self.params = self.flops = self.kept = 0

    def linear(self, rows: int, inputs: int, outputs: int, *, once: bool = False, first: bool = False) -> None:
        """A linear map of ``rows`` tokens; ``once`` counts its weights, ``first`` has no gradient to pass on."""
        self.params += (inputs * outputs + outputs) * once
        self.flops += 2 * rows * inputs * outputs * (BACKWARD + 1 - first)
        self.kept += rows * inputs

    def blocks(self, depth: int, rows: int, width: int, mlp_ratio: float, *, once: bool) -> None:
        """Transformer blocks over ``rows`` tokens."""
        hidden = int(width * mlp_ratio)
        for _ in range(depth):
            self.params += 4 * width * once  # two norms
            self.kept += rows * (
                2 * width + 4 * width + hidden
            )  # norms' inputs; queries, keys, values, sum; GELU's input
            self.linear(rows, width, 3 * width, once=once)
            self.flops += 4 * rows * rows * width * (BACKWARD + 1)
            self.linear(rows, width, width, once=once)
            self.linear(rows, width, hidden, once=once)
            self.linear(rows, hidden, width, once=once)


def cost(config: Config) -> Cost:
    """Count parameters, FLOPs and activations of a training step.

    Args:
        config: Its model, masking and losses decide; data and schedule do not.
    """
    model, tally = config.model, _Tally()
    kept = int(model.num_patches * (1 - config.masking.ratio))
    visible = {"s1": kept, "s2": model.num_patches - kept if config.masking.strategy == "disjoint" else kept}
    for index, (sensor, channels) in enumerate(NUM_CHANNELS.items()):
        rows = visible[sensor] + 1
        tally.linear(rows - 1, model.patch_size**2 * channels, model.embed_dim, once=True, first=True)
        tally.blocks(model.sensor_depth, rows, model.embed_dim, model.mlp_ratio, once=True)
        tally.blocks(model.cross_depth, rows, model.embed_dim, model.mlp_ratio, once=index == 0)
    norms = 1 + (model.pooling == "avg") + 2 * (model.sensor_depth > 0)
    tally.params += 2 * model.embed_dim * (norms + 1)  # and two class tokens
    _decoders(config, tally, visible)
    return Cost(tally.params, tally.flops, tally.kept * FLOAT)


def _decoders(config: Config, tally: _Tally, visible: dict[str, int]) -> None:
    model, targets = config.model, config.loss.targets
    for group in [targets] if model.common_decoder and targets else [(target,) for target in targets]:
        sources = [s for s in visible if any(_in_loss(config, s, target) for target in group)]
        for index, source in enumerate(sources):
            _trunk(model, tally, visible[source] + 1, once=index == 0)
        for target in group:
            terms = [source for source in sources if _in_loss(config, source, target)]
            for index, source in enumerate(terms):
                identical = source != target and config.masking.reconstruction == "identical"
                rows = visible[source] if identical else model.num_patches - visible[source]
                outputs = model.patch_size**2 * NUM_CHANNELS[target]
                tally.linear(rows, model.decoder_embed_dim, outputs, once=index == 0)
                tally.kept += 2 * rows * outputs  # prediction and target


def _trunk(model: Model, tally: _Tally, rows: int, *, once: bool) -> None:
    width = model.decoder_embed_dim
    tally.linear(rows, model.embed_dim, width, once=once)
    tally.blocks(model.decoder_depth, model.num_patches + 1, width, model.mlp_ratio, once=once)
    tally.params += 3 * width * once  # norm and mask token


def _in_loss(config: Config, source: str, target: str) -> bool:
    loss = config.loss
    return bool(loss.umr_weight if source == target else loss.cmr_weight)
