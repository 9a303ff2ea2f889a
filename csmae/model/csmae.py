"""CSMAE: the network of one pretraining and its loss.

B batch, C channels, H W pixels, L patches, P values of a patch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from csmae.config import Loss, Masking, Model
from csmae.model.decoder import Decoder
from csmae.model.encoder import Encoder
from csmae.model.losses import modality_discrepancy, normalise_patches, nt_xent, reconstruction_loss
from csmae.model.masking import Mask, draw_masks
from csmae.model.patches import patchify, take_rows
from csmae.sensors import SENSORS


class Reconstruction(NamedTuple):
    """What the network makes of a masked pair."""

    masks: dict[str, Mask]
    """By sensor."""
    features: dict[str, Tensor]
    """By sensor, pooled features (B, D) of the visible patches."""
    predictions: dict[tuple[str, str], Tensor]
    """By (source, target), all patches (B, L, P)."""


class CSMAE(nn.Module):
    """Cross-sensor masked autoencoder (arXiv 2401.07782).

    Every parameter gets a gradient in every configuration: a decoder, a head or a trained norm that no loss reads is
    not built or not trained.

    Args:
        model: Architecture.
        masking: Which patches are hidden.
        loss: Weights of the terms; those of weight 0 are not computed.
    """

    def __init__(self, model: Model, masking: Masking, loss: Loss) -> None:
        super().__init__()
        self.masking, self.loss, self.patch_size = masking, loss, model.patch_size
        self.encoder = Encoder(model)
        self.encoder.fc_norm.requires_grad_(loss.contrastive)
        targets = loss.targets
        groups = {"common": targets} if model.common_decoder and targets else {t: (t,) for t in targets}
        self.decoders = nn.ModuleDict({name: Decoder(model, heads) for name, heads in groups.items()})
        self.apply(_initialise)

    def forward(
        self, s1_bchw: Tensor, s2_bchw: Tensor, noise_s1_bl: Tensor, noise_s2_bl: Tensor, pull_2bd: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of a batch and its terms.

        Args:
            s1_bchw, s2_bchw: Normalised images of the pairs.
            noise_s1_bl, noise_s2_bl: Uniform noise in [0, 1) that chooses the visible patches.
            pull_2bd: Gradient of the contrastive terms with respect to both sensors' features, where these terms have
                been computed over a larger batch: they are passed on, and not computed again.

        Returns:
            Scalars: ``loss`` (the weighted sum) and the unweighted terms that are on: ``umr_s1``, ``umr_s2``,
            ``cmr_s1_to_s2``, ``cmr_s2_to_s1``, ``mim``, ``mde``.
        """
        patches, masks, tokens = self._encode(s1_bchw, s2_bchw, noise_s1_bl, noise_s2_bl)
        terms = self._reconstruct(patches, masks, tokens)
        if not self.loss.contrastive:
            return _total(terms)
        z_2bd = self._pool(tokens)
        if pull_2bd is None:
            return _total(terms | self._contrast(z_2bd))
        pulled = (z_2bd.float() * pull_2bd).sum()
        terms["pull"] = 1.0, pulled - pulled.detach()  # a gradient without a value
        total = _total(terms)
        del total["pull"]
        return total

    def features(self, s1_bchw: Tensor, s2_bchw: Tensor, noise_s1_bl: Tensor, noise_s2_bl: Tensor) -> Tensor:
        """Both sensors' features of the visible patches, (2, B, D): what the contrastive terms read."""
        return self._pool(self._encode(s1_bchw, s2_bchw, noise_s1_bl, noise_s2_bl)[2])

    def contrast(self, z_2bd: Tensor) -> dict[str, Tensor]:
        """The contrastive terms alone: ``loss`` (their weighted sum), and ``mim``, ``mde`` where they are on."""
        return _total(self._contrast(z_2bd))

    @torch.no_grad()
    def reconstruct(self, s1_bchw: Tensor, s2_bchw: Tensor, noise_s1_bl: Tensor, noise_s2_bl: Tensor) -> Reconstruction:
        """Predict every patch of both sensors from each; arguments as in ``forward``."""
        _, masks, tokens = self._encode(s1_bchw, s2_bchw, noise_s1_bl, noise_s2_bl)
        predictions = {}
        for decoder in self.decoders.values():
            assert isinstance(decoder, Decoder)
            for source, trunk in decoder(tokens, masks).items():
                decoded = take_rows(decoder.finish(trunk, slice(1, None)), masks[source].restore_bl)
                for target in decoder.heads:
                    predictions[source, target] = decoder.predict(decoded, target)
        return Reconstruction(masks, dict(zip(tokens, self._pool(tokens), strict=True)), predictions)

    def _encode(
        self, s1_bchw: Tensor, s2_bchw: Tensor, noise_s1_bl: Tensor, noise_s2_bl: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Mask], dict[str, Tensor]]:
        patches = {"s1": patchify(s1_bchw, self.patch_size), "s2": patchify(s2_bchw, self.patch_size)}
        masks = draw_masks(noise_s1_bl, noise_s2_bl, self.masking)
        tokens = self.encoder(patches, {s: mask.keep_bk for s, mask in masks.items()})
        return patches, masks, tokens

    def _reconstruct(
        self, patches: dict[str, Tensor], masks: dict[str, Mask], tokens: dict[str, Tensor]
    ) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each reconstruction term; each decoder passes each source once."""
        if self.loss.norm_pix:
            patches = {s: normalise_patches(p) for s, p in patches.items()}
        terms = {}
        for decoder in self.decoders.values():
            assert isinstance(decoder, Decoder)
            wanted = {(s, t): w for t in decoder.heads for s in SENSORS if (w := self._weight(s, t))}
            trunk = decoder({s: tokens[s] for s in SENSORS if any(source == s for source, _ in wanted)}, masks)
            decoded: dict[tuple[str, bool], Tensor] = {}
            for (source, target), weight in wanted.items():
                hidden = source == target or self.masking.reconstruction == "disjoint"
                keep, removed = masks[source]
                seen = 1 + keep.shape[1]
                rows, asked = (removed, slice(seen, None)) if hidden else (keep, slice(1, seen))
                if (source, hidden) not in decoded:  # both heads of a common decoder may read the same patches
                    decoded[source, hidden] = decoder.finish(trunk[source], asked)
                predicted = decoder.predict(decoded[source, hidden], target)
                name = f"umr_{target}" if source == target else f"cmr_{source}_to_{target}"
                terms[name] = weight, reconstruction_loss(predicted, take_rows(patches[target], rows))
        return terms

    def _contrast(self, z_2bd: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each contrastive term."""
        terms = {}
        if self.loss.mim_weight:
            terms["mim"] = self.loss.mim_weight, nt_xent(z_2bd[0], z_2bd[1], self.loss.temperature)
        if self.loss.mde_weight:
            terms["mde"] = self.loss.mde_weight, modality_discrepancy(z_2bd[0], z_2bd[1])
        return terms

    def _pool(self, tokens: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.encoder.pool(tokens[s]) for s in SENSORS])

    def _weight(self, source: str, target: str) -> float:
        weight = self.loss.umr_weight if source == target else self.loss.cmr_weight
        return weight * (self.loss.s1_weight if target == "s1" else 1.0)


def _total(terms: dict[str, tuple[float, Tensor]]) -> dict[str, Tensor]:
    """The weighted sum of terms as ``loss``, and the terms."""
    loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
    return {"loss": loss} | {name: term for name, (_, term) in terms.items()}


def _initialise(module: nn.Module) -> None:
    """Weights as in MAE (arXiv 2111.06377, appendix A.1): Xavier-uniform projections, tokens of deviation 0.02."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Encoder):
        for token in module.cls_token.values():
            nn.init.normal_(token, std=0.02)
    elif isinstance(module, Decoder):
        nn.init.normal_(module.mask_token, std=0.02)
