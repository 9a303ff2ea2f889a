"""What a configuration costs, counted from its shapes: nothing is built or run."""

from __future__ import annotations

from typing import NamedTuple

from csmae.config import Config, Model
from csmae.sensors import NUM_CHANNELS

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


class _CostCounter:
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
        for _ in range(depth):
            self.block(rows, rows, width, mlp_ratio, once=once)

    def block(self, rows: int, asked: int, width: int, mlp_ratio: float, *, once: bool, common: int = 0) -> None:
        """A transformer block over ``rows`` tokens, ``asked`` of which are computed; all images have ``common`` of them."""
        hidden, distinct = int(width * mlp_ratio), rows - common
        self.params += 4 * width * once  # two norms
        # Norms' inputs; queries, keys, values, sum; GELU's input.
        self.kept += (distinct + asked) * width + 2 * (rows + asked) * width + asked * hidden
        self.linear(distinct, width, 2 * width, once=once)
        self.linear(min(asked, distinct), width, width, once=once)
        self.kept -= min(asked, distinct) * width  # one input of queries, keys and values
        self.flops += 4 * rows * asked * width * (BACKWARD + 1)
        self.linear(asked, width, width, once=once)
        self.linear(asked, width, hidden, once=once)
        self.linear(asked, hidden, width, once=once)


def cost(config: Config) -> Cost:
    """Count parameters, FLOPs and activations of a training step.

    Args:
        config: Its model, masking and losses decide; data and schedule do not.
    """
    model, tally = config.model, _CostCounter()
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


def _decoders(config: Config, tally: _CostCounter, visible: dict[str, int]) -> None:
    model, targets = config.model, config.loss.targets
    for group in [targets] if model.common_decoder and targets else [(target,) for target in targets]:
        pairs = [(source, target) for target in group for source in visible if _in_loss(config, source, target)]
        for index, source in enumerate(dict.fromkeys(source for source, _ in pairs)):
            _trunk(model, tally, visible[source] + 1, once=index == 0)
        for index, (source, hidden) in enumerate(dict.fromkeys((s, _hidden(config, s, t)) for s, t in pairs)):
            asked = model.num_patches - visible[source] if hidden else visible[source]
            tally.block(model.num_patches + 1, asked, model.decoder_embed_dim, model.mlp_ratio, once=index == 0)
        for index, (source, target) in enumerate(pairs):
            asked = model.num_patches - visible[source] if _hidden(config, source, target) else visible[source]
            outputs = model.patch_size**2 * NUM_CHANNELS[target]
            once = target not in [t for _, t in pairs[:index]]
            tally.linear(asked, model.decoder_embed_dim, outputs, once=once)
            tally.kept += 2 * asked * outputs  # prediction and target


def _trunk(model: Model, tally: _CostCounter, rows: int, *, once: bool) -> None:
    """A decoder but for its last block, which computes the patches in the loss only, and its heads."""
    width = model.decoder_embed_dim
    tally.linear(rows, model.embed_dim, width, once=once)
    whole, hidden = model.num_patches + 1, model.num_patches + 1 - rows
    for index in range(model.decoder_depth - 1):
        tally.block(whole, whole, width, model.mlp_ratio, once=once, common=0 if index else hidden)
    tally.params += 3 * width * once  # norm and mask token


def _hidden(config: Config, source: str, target: str) -> bool:
    """Whether the loss reads the patches hidden from the source, not those visible in it."""
    return source == target or config.masking.reconstruction == "disjoint"


def _in_loss(config: Config, source: str, target: str) -> bool:
    loss = config.loss
    return bool(loss.umr_weight if source == target else loss.cmr_weight)
