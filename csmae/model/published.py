"""Conversion of weights that the authors of CSMAE published to this package's layout.

The published layout (repository of arXiv 2401.07782) names tensors ``backbone.*`` and ``decoder*``; their shapes give the
sizes of the architecture.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csmae.config import ConfigError, Model, one_line
from csmae.model.patches import sincos_positions

NUM_HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16}
"""Heads by the encoder's published name. The settings beside the published weights give neither: they are ``vit_base``."""

DECODER_NUM_HEADS = 16

_RENAMES = (
    (r"^backbone\.cls_token$", "encoder.cls_token.s1"),
    (r"^backbone\.cls_token_s2$", "encoder.cls_token.s2"),
    (r"^backbone\.patch_embed\.proj\.", "encoder.patch_embed.s1."),
    (r"^backbone\.patch_embed_s2\.proj\.", "encoder.patch_embed.s2."),
    (r"^backbone\.blocks_(s[12])\.", r"encoder.sensor_blocks.\1."),
    (r"^backbone\.norm_(s[12])\.", r"encoder.sensor_norm.\1."),
    (r"^backbone\.blocks\.", "encoder.cross_blocks."),
    (r"^backbone\.(norm|fc_norm)\.", r"encoder.\1."),
    (r"^decoder_s[12]_to_(s[12])\.decoder_pred\.", r"decoders.\1.heads.\1."),
    (r"^decoder_s[12]_to_(s[12])\.", r"decoders.\1."),
    (r"^decoder\.decoder_pred_s[12]_to_(s[12])\.", r"decoders.common.heads.\1."),
    (r"^decoder\.", "decoders.common."),
)


def rename(published: str) -> str:
    """Translate the name of a published parameter.

    Raises:
        ConfigError: The name is not that of a CSMAE parameter.
    """
    for pattern, replacement in _RENAMES:
        name, found = re.subn(pattern, replacement, published)
        if found:
            return re.sub(r"\.decoder_(embed|blocks|norm)\.", r".\1.", name)
    raise ConfigError(f"{published!r} is not a parameter of a CSMAE")


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename published tensors; convolutions over patches become linear layers.

    Raises:
        ConfigError: A name is unknown, or a position embedding is not the fixed sine-cosine one.
    """
    converted = {}
    for name, tensor in state.items():
        if name.endswith("pos_embed"):
            fixed = sincos_positions(tensor.shape[1] - 1, tensor.shape[2])
            if not torch.allclose(tensor[0], fixed, atol=1e-5):
                raise ConfigError(f"{name!r} is not the fixed sine-cosine embedding")
        elif name.endswith("patch_embed.proj.weight") or name.endswith("patch_embed_s2.proj.weight"):
            converted[rename(name)] = tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        else:
            converted[rename(name)] = tensor
    return converted


def infer_model(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Model:
    """Infer the architecture of published weights.

    Args:
        state: Published state dictionary; its shapes give widths, depths and patch size.
        settings: Result of ``read_settings``.

    Raises:
        ConfigError: The tensors are not those of a CSMAE, or do not match the settings.
    """
    try:
        width, _, patch_size, _ = state["backbone.patch_embed.proj.weight"].shape
        side = int((state["backbone.pos_embed"].shape[1] - 1) ** 0.5)
        trunk = next((name.split(".")[0] for name in state if name.endswith("decoder_embed.weight")), None)
        sensor_depth, common = _count(state, "backbone.blocks_s1."), trunk == "decoder"
        values = {
            "variant": ("se" if sensor_depth else "ce") + ("cd" if common else "sd"),
            "img_size": side * patch_size,
            "patch_size": patch_size,
            "embed_dim": width,
            "num_heads": settings.get("num_heads") or NUM_HEADS[settings.get("name", "vit_base")],
            "mlp_ratio": _mlp_ratio(state, width),
            "sensor_depth": sensor_depth,
            "cross_depth": _count(state, "backbone.blocks."),
            "pooling": "avg" if settings.get("global_pool", "avg") == "avg" else "cls",
        }
        if trunk is not None:
            values["decoder_embed_dim"] = state[f"{trunk}.decoder_embed.weight"].shape[0]
            values["decoder_depth"] = _count(state, f"{trunk}.decoder_blocks.")
            values["decoder_num_heads"] = settings.get("decoder_num_heads", DECODER_NUM_HEADS)
        return Model(**values)
    except KeyError as error:
        raise ConfigError(f"{error.args[0]!r} is missing or unknown") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"weights and settings do not make a CSMAE: {one_line(error)}") from None


def read_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the architecture's sections of ``cfg.yaml`` or of a training run's ``args.yaml``.

    Returns:
        Those of ``name``, ``num_heads``, ``global_pool``, ``decoder_num_heads`` and others that are given.
    """
    backbone = content.get("backbone")
    sections = [content.get("kwargs"), content.get("method_kwargs"), backbone]
    sections += [backbone.get("kwargs")] if isinstance(backbone, Mapping) else []
    return {name: value for section in sections if isinstance(section, Mapping) for name, value in section.items()}


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _mlp_ratio(state: Mapping[str, Tensor], width: int) -> float:
    hidden = next(
        (t.shape[0] for name, t in state.items() if re.match(r"backbone\.blocks\w*\..*fc1\.weight", name)), 4 * width
    )
    return hidden / width
