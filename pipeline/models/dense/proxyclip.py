"""ProxyCLIP (Lan et al., ECCV 2024): CLIP's values, attention where another network sees likeness.

Letters: B images, n = h w positions of that network's grid, D CLIP's width, C joint space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.clip import ClipEncoder
from pipeline.models.clip.patches import load_patch_encoder
from pipeline.models.dense.affinity import attend_to_alike
from pipeline.models.dense.attentions import clip_vit
from pipeline.models.dense.denseclip import ClipLabeller, load_encoder_and_text
from pipeline.models.layers.dino import DinoEncoder

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.dense import ProxyClipParams
    from pipeline.vocabulary.categories import Names

SHIFT = 1.2


class ProxyClip(ClipLabeller):
    """ProxyCLIP as a dense labeller, see `ObjectLabeller`; scores lie on the proxy's grid."""

    params: ProxyClipParams

    def __init__(
        self,
        encoder: ClipEncoder,
        text: Tensor,
        params: ProxyClipParams,
        proxy: DinoEncoder | ClipEncoder | None,
    ) -> None:
        """See `ClipLabeller`.

        Args:
            encoder: CLIP.
            text: (K, C) unit rows by label id.
            params: its options.
            proxy: gives the attention; None for the keys of CLIP's own last block.

        Raises:
            PipelineError: the encoder is not CLIP's own ViT, or no windows of that size.
        """
        super().__init__(encoder, text, params)
        self._tower = clip_vit(encoder, params.method)
        self._proxy = proxy
        if proxy is not None:  # of images of whole patches of the one, most are so of the other
            self.patch_size = max(self.patch_size, proxy.patch_size)

    @property
    def settings(self) -> dict[str, Any]:
        """All that labels depend on besides image and names."""
        proxy = self._proxy.fingerprint() if self._proxy is not None else None
        return {**super().settings, "dino_weights": proxy}

    def with_text(self, text: Tensor) -> Self:
        """The same with other unit rows (K, C)."""
        return type(self)(self.encoder, text, self.params, self._proxy).eval()

    @torch.no_grad()
    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as `forward` gives them, and the features (B, C, h, w) behind them, float32."""
        inside = self._tower.enter_last(self.normalise(images), self.options)
        _, keys, values = (
            part[:, :, 1:].transpose(2, 3).flatten(1, 2).unflatten(2, inside.grid)
            for part in self._tower.heads(inside.normed)
        )
        if self._proxy is None:
            alike = keys
        else:
            alike = self._proxy.patch_features(images, facet=self.params.facet)
        attended = proxy_attention(alike, values).flatten(2).transpose(1, 2)
        joint = self._tower.leave(self._tower.merge(attended[:, None]), self.options)
        features = joint.transpose(1, 2).unflatten(2, alike.shape[-2:]).float()
        return self.compare(features), features


def load_proxyclip(params: ProxyClipParams, names: Names, runtime: Runtime) -> ProxyClip:
    """ProxyCLIP with the encoders of its params, for some names.

    Raises:
        PipelineError: an encoder that cannot be loaded or is not CLIP's own ViT, or a name that it
            does not know.
    """
    encoder, text = load_encoder_and_text(params, names, runtime)
    proxy: DinoEncoder | ClipEncoder | None = None
    if params.dino is not None:
        proxy = load_patch_encoder(params.dino, runtime, field="pseudo_label.dino")
    return ProxyClip(encoder, text, params, proxy).eval()


def proxy_attention(alike: Tensor, values: Tensor) -> Tensor:
    """Values attended to where other features are alike, one attention for all heads.

    With S the cosines of one image and its own mean, softmax(3 (S - 1.2 mean S)) over the entries
    that are not negative. A position without any, as the only one of an image, attends to itself.

    Args:
        alike: (B, C', h, w).
        values: (B, D, h', w'), resized bilinearly to that grid.

    Returns:
        (B, D, h, w).
    """
    grid = alike.shape[-2:]
    values = F.interpolate(values, size=grid, mode="bilinear", align_corners=False)
    attended = [
        attend_to_alike(features, own, shift=SHIFT)
        for features, own in zip(alike.flatten(2).mT, values.flatten(2).mT, strict=True)
    ]
    return torch.stack(attended).mT.unflatten(2, grid)
