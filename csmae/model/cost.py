"""The cost of a configuration, computed from its shapes without building or running the network."""

from __future__ import annotations

from typing import NamedTuple

from csmae.config import Config
from csmae.model.masking import loss_reads_removed
from csmae.sensors import NUM_CHANNELS

FLOAT32_BYTES = 4


class Cost(NamedTuple):
    """Cost of one pretraining configuration."""

    params: int
    """Parameters of encoder and decoders, frozen ones included."""
    flops: int
    """Floating-point operations of a training step (forward and backward) per pair; a multiply-add counts as two."""
    activation_bytes: int
    """Estimated memory that the forward pass keeps for the backward pass, per pair in float32."""


def cost(config: Config) -> Cost:
    """Count parameters, FLOPs and activations of a training step.

    Args:
        config: Only its model, masking and losses matter.
    """
    model, counter = config.model, _Counter(config.model.mlp_ratio)
    kept = int(model.num_patches * (1 - config.masking.ratio))
    visible = {"s1": kept, "s2": model.num_patches - kept if config.masking.strategy == "disjoint" else kept}
    for index, (sensor, channels) in enumerate(NUM_CHANNELS.items()):
        values, num_tokens = model.patch_size**2 * channels, visible[sensor] + 1
        counter.linear(visible[sensor], values, model.embed_dim, count_params=True, input_gradient=False)
        for _ in range(model.sensor_depth):
            counter.block(num_tokens, num_tokens, model.embed_dim, count_params=True)
        for _ in range(model.cross_depth):
            counter.block(num_tokens, num_tokens, model.embed_dim, count_params=index == 0)
    num_norms = 1 + (model.pooling == "avg") + 2 * (model.sensor_depth > 0)
    counter.params += 2 * model.embed_dim * (num_norms + 1)  # two class tokens have the size of one norm
    _count_decoders(config, counter, visible)
    return Cost(counter.params, counter.flops, counter.activations * FLOAT32_BYTES)


def checkpoint_bytes(config: Config) -> int:
    """Size of a training's files that it resumes from and is used by: weights, AdamW's two moments, and the encoder.

    An upper bound: the encoder counts as large as the whole network.
    """
    return 4 * cost(config).params * FLOAT32_BYTES


def cost_metrics(config: Config) -> dict[str, float]:
    """The cost by the names that objectives and constraints use, such as ``cost/params``."""
    return {f"cost/{name}": float(value) for name, value in cost(config)._asdict().items()}


class _Counter:
    """Adds up the cost of layers, per pair."""

    def __init__(self, mlp_ratio: float) -> None:
        self.params = self.flops = self.activations = 0
        self._mlp_ratio = mlp_ratio

    def linear(
        self, num_tokens: int, inputs: int, outputs: int, *, count_params: bool, input_gradient: bool = True
    ) -> None:
        """Add a linear layer; ``count_params`` is False where a layer is applied again."""
        self.params += (inputs * outputs + outputs) * count_params
        # Forward; gradients of weights and inputs.
        self.flops += 2 * num_tokens * inputs * outputs * (2 + input_gradient)
        self.activations += num_tokens * inputs

    def block(self, num_tokens: int, num_queries: int, width: int, *, count_params: bool, shared: int = 0) -> None:
        """Add a transformer block; all images have ``shared`` tokens in common, whose projections cost nothing."""
        hidden, distinct = int(width * self._mlp_ratio), num_tokens - shared
        self.params += 4 * width * count_params  # two norms
        # Inputs of the norms; queries, keys, values and their sum; input of GELU.
        self.activations += (distinct + num_queries) * width + 2 * (num_tokens + num_queries) * width
        self.activations += num_queries * hidden
        self.linear(distinct, width, 2 * width, count_params=count_params)
        self.linear(min(num_queries, distinct), width, width, count_params=count_params)
        self.activations -= min(num_queries, distinct) * width  # queries, keys and values have the same input
        self.flops += 4 * num_tokens * num_queries * width * 3
        self.linear(num_queries, width, width, count_params=count_params)
        self.linear(num_queries, width, hidden, count_params=count_params)
        self.linear(num_queries, hidden, width, count_params=count_params)


def _count_decoders(config: Config, counter: _Counter, visible: dict[str, int]) -> None:
    model, targets = config.model, config.loss.targets
    for group in [targets] if model.common_decoder and targets else [(target,) for target in targets]:
        pairs = [(source, target) for target in group for source in visible if config.loss.weight(source, target)]
        for index, source in enumerate(dict.fromkeys(source for source, _ in pairs)):
            _count_trunk(config, counter, visible[source] + 1, count_params=index == 0)
        num_queries = {pair: _patches_in_loss(config, visible, *pair) for pair in pairs}
        last_blocks = dict.fromkeys((s, loss_reads_removed(config.masking, s, t), num_queries[s, t]) for s, t in pairs)
        for index, (_, _, num) in enumerate(last_blocks):
            counter.block(model.num_patches + 1, num, model.decoder_embed_dim, count_params=index == 0)
        for index, (source, target) in enumerate(pairs):
            outputs, num = model.patch_size**2 * NUM_CHANNELS[target], num_queries[source, target]
            new_head = target not in [t for _, t in pairs[:index]]
            counter.linear(num, model.decoder_embed_dim, outputs, count_params=new_head)
            counter.activations += 2 * num * outputs  # prediction and target


def _count_trunk(config: Config, counter: _Counter, num_visible: int, *, count_params: bool) -> None:
    """Add a decoder without its last block, which computes only the patches in the loss, and without its heads."""
    model, width, num_tokens = config.model, config.model.decoder_embed_dim, config.model.num_patches + 1
    counter.linear(num_visible, model.embed_dim, width, count_params=count_params)
    for index in range(model.decoder_depth - 1):
        shared = 0 if index else num_tokens - num_visible  # mask tokens
        counter.block(num_tokens, num_tokens, width, count_params=count_params, shared=shared)
    counter.params += 3 * width * count_params  # norm and mask token


def _patches_in_loss(config: Config, visible: dict[str, int], source: str, target: str) -> int:
    removed = loss_reads_removed(config.masking, source, target)
    return config.model.num_patches - visible[source] if removed else visible[source]
