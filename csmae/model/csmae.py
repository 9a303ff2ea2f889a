"""CSMAE: the network of a pretraining and its loss.

B batch, C channels, H W pixels, L patches, P values of a patch, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from csmae.config import Config, Loss, Masking, Model
from csmae.model.decoder import Decoder
from csmae.model.encoder import Encoder
from csmae.model.losses import modality_discrepancy, normalize_patches, nt_xent, reconstruction_loss
from csmae.model.masking import Mask, draw_masks, loss_reads_removed
from csmae.model.patches import gather_tokens, patchify
from csmae.sensors import SENSORS

Terms = dict[str, tuple[float, Tensor]]
"""Weight and value of each loss term."""


class Reconstruction(NamedTuple):
    """The network's outputs for masked pairs."""

    masks: dict[str, Mask]
    """By sensor."""
    predictions: dict[tuple[str, str], Tensor]
    """By (source, target), all patches (B, L, P)."""


class CSMAE(nn.Module):
    """Cross-sensor masked autoencoder (arXiv 2401.07782).

    Every trainable parameter gets a gradient in every configuration: decoders and heads that no loss reads are not
    built, a norm that no loss reads is frozen.

    Args:
        model: Architecture.
        masking: Which patches are removed.
        loss: Weights of the terms; terms of weight 0 are not computed.
    """

    def __init__(self, model: Model, masking: Masking, loss: Loss) -> None:
        super().__init__()
        self.masking, self.loss, self.patch_size = masking, loss, model.patch_size
        self.encoder = Encoder(model)
        self.encoder.fc_norm.requires_grad_(loss.contrastive)
        targets = loss.targets
        groups = {"common": targets} if model.common_decoder and targets else {t: (t,) for t in targets}
        self.decoders = nn.ModuleDict({name: Decoder(model, group) for name, group in groups.items()})
        self.apply(_initialize)

    def forward(
        self,
        s1_bchw: Tensor,
        s2_bchw: Tensor,
        noise_s1_bl: Tensor,
        noise_s2_bl: Tensor,
        cached_gradient_2bd: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch and its terms.

        Args:
            s1_bchw, s2_bchw: Normalized images of the pairs.
            noise_s1_bl, noise_s2_bl: Uniform noise in [0, 1) that chooses the visible patches.
            cached_gradient_2bd: Gradient of the contrastive terms with respect to both sensors' features, computed
                over a larger batch. If given, it is backpropagated and the contrastive terms are not computed.

        Returns:
            Scalars: ``loss`` (the weighted sum) and the unweighted terms that are on: ``umr_s1``, ``umr_s2``,
            ``cmr_s1_to_s2``, ``cmr_s2_to_s1``, ``mim``, ``mde``.
        """
        patches, masks, tokens = self._encode(s1_bchw, s2_bchw, noise_s1_bl, noise_s2_bl)
        terms = self._reconstruction_terms(patches, masks, tokens)
        if not self.loss.contrastive:
            return _weighted_sum(terms)
        z_2bd = self._pool(tokens)
        if cached_gradient_2bd is None:
            return _weighted_sum(terms | self._contrastive_terms(z_2bd))
        surrogate = (z_2bd.float() * cached_gradient_2bd).sum()
        terms["surrogate"] = 1.0, surrogate - surrogate.detach()  # has a gradient, but adds 0 to the loss
        total = _weighted_sum(terms)
        del total["surrogate"]
        return total

    def features(self, s1_bchw: Tensor, s2_bchw: Tensor, noise_s1_bl: Tensor, noise_s2_bl: Tensor) -> Tensor:
        """Both sensors' features of the visible patches, (2, B, D): the input of ``contrast``."""
        return self._pool(self._encode(s1_bchw, s2_bchw, noise_s1_bl, noise_s2_bl)[2])

    def contrast(self, z_2bd: Tensor) -> dict[str, Tensor]:
        """Compute the contrastive terms alone: ``loss`` (their weighted sum), and ``mim``, ``mde`` if they are on."""
        return _weighted_sum(self._contrastive_terms(z_2bd))

    @torch.no_grad()
    def reconstruct(self, s1_bchw: Tensor, s2_bchw: Tensor, noise_s1_bl: Tensor, noise_s2_bl: Tensor) -> Reconstruction:
        """Predict every patch of both sensors from each sensor; arguments as in ``forward``."""
        _, masks, tokens = self._encode(s1_bchw, s2_bchw, noise_s1_bl, noise_s2_bl)
        predictions = {}
        for decoder in self.decoders.values():
            assert isinstance(decoder, Decoder)
            for source, trunk in decoder(tokens, masks).items():
                decoded = gather_tokens(decoder.decode(trunk, slice(1, None)), masks[source].ids_restore_bl)
                for target in decoder.heads:
                    predictions[source, target] = decoder.predict(decoded, target)
        return Reconstruction(masks, predictions)

    def _encode(
        self, s1_bchw: Tensor, s2_bchw: Tensor, noise_s1_bl: Tensor, noise_s2_bl: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Mask], dict[str, Tensor]]:
        """Patches, masks and encoded visible tokens, each by sensor."""
        patches = {"s1": patchify(s1_bchw, self.patch_size), "s2": patchify(s2_bchw, self.patch_size)}
        masks = draw_masks(noise_s1_bl, noise_s2_bl, self.masking)
        tokens = self.encoder(patches, {s: mask.ids_keep_bk for s, mask in masks.items()})
        return patches, masks, tokens

    def _reconstruction_terms(
        self, patches: dict[str, Tensor], masks: dict[str, Mask], tokens: dict[str, Tensor]
    ) -> Terms:
        """The UMR and CMR terms; each decoder processes each source once."""
        if self.loss.norm_pix:
            patches = {s: normalize_patches(p) for s, p in patches.items()}
        terms: Terms = {}
        for decoder in self.decoders.values():
            assert isinstance(decoder, Decoder)
            weights = {(s, t): w for t in decoder.heads for s in SENSORS if (w := self.loss.weight(s, t))}
            trunk = decoder({s: tokens[s] for s in SENSORS if any(s == source for source, _ in weights)}, masks)
            decoded: dict[tuple[str, bool], Tensor] = {}
            for (source, target), weight in weights.items():
                mask, removed = masks[source], loss_reads_removed(self.masking, source, target)
                ids = mask.ids_removed_bm if removed else mask.ids_keep_bk
                if (source, removed) not in decoded:  # both heads of a common decoder may read the same patches
                    first_removed = 1 + mask.ids_keep_bk.shape[1]
                    query_slice = slice(first_removed, None) if removed else slice(1, first_removed)
                    decoded[source, removed] = decoder.decode(trunk[source], query_slice)
                predicted = decoder.predict(decoded[source, removed], target)
                name = f"umr_{target}" if source == target else f"cmr_{source}_to_{target}"
                terms[name] = weight, reconstruction_loss(predicted, gather_tokens(patches[target], ids))
        return terms

    def _contrastive_terms(self, z_2bd: Tensor) -> Terms:
        """The MIM and MDE terms."""
        terms: Terms = {}
        if self.loss.mim_weight:
            terms["mim"] = self.loss.mim_weight, nt_xent(z_2bd[0], z_2bd[1], self.loss.temperature)
        if self.loss.mde_weight:
            terms["mde"] = self.loss.mde_weight, modality_discrepancy(z_2bd[0], z_2bd[1])
        return terms

    def _pool(self, tokens: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.encoder.pool(tokens[s]) for s in SENSORS])


def build_model(config: Config) -> CSMAE:
    """Build the network with the initial weights of ``train.seed``; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return CSMAE(config.model, config.masking, config.loss)


def _weighted_sum(terms: Terms) -> dict[str, Tensor]:
    """The weighted sum of terms as ``loss``, and the terms."""
    loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
    return {"loss": loss} | {name: term for name, (_, term) in terms.items()}


def _initialize(module: nn.Module) -> None:
    """Initialize as in MAE (arXiv 2111.06377, appendix A.1): Xavier-uniform projections, tokens with deviation 0.02."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Encoder):
        for token in module.cls_token.values():
            nn.init.normal_(token, std=0.02)
    elif isinstance(module, Decoder):
        nn.init.normal_(module.mask_token, std=0.02)
