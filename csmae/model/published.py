"""Weights in the layout in which the authors of CSMAE share theirs, as ours.

Layout of arXiv 2401.07782's repository: ``backbone.*`` and ``decoder*``; sizes are read off the tensors.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from csmae.config import ConfigError, Model
from csmae.model.patches import sincos_positions

NUM_HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16}
"""Heads by the encoder's published name; the files beside the published weights give neither: they are ``vit_base``."""

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
    """Our name of a published parameter.

    Raises:
        ConfigError: The name belongs to no part of a CSMAE.
    """
    for pattern, replacement in _RENAMES:
        name, found = re.subn(pattern, replacement, published)
        if found:
            return re.sub(r"\.decoder_(embed|blocks|norm)\.", r".\1.", name)
    raise ConfigError(f"{published!r} is no parameter of a CSMAE")


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names; convolutions over patches become linear maps of patches.

    Raises:
        ConfigError: An unknown name, or position embeddings other than the fixed sine-cosine ones.
    """
    ours = {}
    for name, tensor in state.items():
        if name.endswith("pos_embed"):
            fixed = sincos_positions(tensor.shape[1] - 1, tensor.shape[2])
            if not torch.allclose(tensor[0], fixed, atol=1e-5):
                raise ConfigError(f"{name!r} is not the fixed sine-cosine embedding")
        elif name.endswith("patch_embed.proj.weight") or name.endswith("patch_embed_s2.proj.weight"):
            ours[rename(name)] = tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        else:
            ours[rename(name)] = tensor
    return ours


def infer_model(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Model:
    """The architecture of published weights.

    Args:
        state: Published state dictionary; widths, depths and patch size are read off its tensors.
        settings: What ``read_settings`` found.

    Raises:
        ConfigError: These are not the tensors of a CSMAE, or not those that the settings describe.
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
        raise ConfigError(f"{error.args[0]!r} is missing, or no part of a CSMAE") from None
    except (AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"weights and settings do not make a CSMAE: {reason}") from None


def read_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """What ``cfg.yaml`` or a training run's ``args.yaml`` says of the architecture, without its sections.

    Returns:
        Such as ``name``, ``num_heads``, ``global_pool``, ``decoder_num_heads``, where they are said.
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
