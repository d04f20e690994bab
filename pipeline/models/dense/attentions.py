"""Labellers that replace the attention of the last block of CLIP's own ViT.

SCLIP (Wang et al., ECCV 2024), ClearCLIP (Lan et al., ECCV 2024), NACLIP (Hajimiri et al., WACV
2025) and SC-CLIP (`scclip`). Each attends where patches are alike instead of where CLIP looks.
Letters: B images, N = 1 + h w tokens (class token first), C joint space, h w patch grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.clip import ClipEncoder, ClipVit, DenseOptions
from pipeline.models.dense.denseclip import ClipLabeller, load_encoder_and_text
from pipeline.models.dense.scclip import scclip

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.dense import AttentionParams
    from pipeline.vocabulary.categories import Names

Features = Callable[[ClipVit, Tensor, DenseOptions], Tensor]

NEIGHBOURHOOD = 5.0  # NACLIP's standard deviation, in patches


class AttentionLabeller(ClipLabeller):
    """A method of `FEATURES` as a dense labeller, see `ObjectLabeller`."""

    params: AttentionParams

    def __init__(self, encoder: ClipEncoder, text: Tensor, params: AttentionParams) -> None:
        """See `ClipLabeller`.

        Raises:
            PipelineError: the encoder is not CLIP's own ViT, or no windows of that size.
        """
        super().__init__(encoder, text, params)
        self._tower = clip_vit(encoder, params.method)
        self._features = FEATURES[params.method]

    @torch.no_grad()
    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as `forward` gives them, and the features (B, C, h, w) behind them, float32."""
        features = self._features(self._tower, self.normalise(images), self.options).float()
        return self.compare(features), features


def load_attention_labeller(
    params: AttentionParams, names: Names, runtime: Runtime
) -> AttentionLabeller:
    """The method of some params, with their encoder, for some names.

    Raises:
        PipelineError: an encoder that cannot be loaded or is not CLIP's own ViT, or a name that it
            does not know.
    """
    encoder, text = load_encoder_and_text(params, names, runtime)
    return AttentionLabeller(encoder, text, params).eval()


def clip_vit(encoder: ClipEncoder, method: str) -> ClipVit:
    """The tower of an encoder.

    Raises:
        PipelineError: it is not CLIP's own ViT.
    """
    if not isinstance(encoder.tower, ClipVit):
        raise PipelineError(
            f"pseudo_label.method: {method} changes the last attention of CLIP's own ViT, but the "
            f"encoder is {encoder.tower.describe()}; use an encoder such as ViT-B-16-quickgelu, or "
            "method: denseclip"
        )
    return encoder.tower


def sclip(tower: ClipVit, images: Tensor, options: DenseOptions) -> Tensor:
    """Features (B, C, h, w) of normalised images by softmax(s q q') + softmax(s k k').

    Residual and MLP are kept; s is the usual scale of a head, one over the root of its width.
    """
    inside = tower.enter_last(images, options)
    queries, keys, values = tower.heads(inside.normed)
    attended = tower.merge(_attend(queries, values) + _attend(keys, values))
    tokens = tower.add_residual(inside.tokens, attended, options)
    return _as_map(tower.leave(tokens, options), inside.grid)


def clearclip(tower: ClipVit, images: Tensor, options: DenseOptions) -> Tensor:
    """Features as of `sclip`, by softmax(s q q') alone, without residual and MLP."""
    inside = tower.enter_last(images, options)
    queries, _, values = tower.heads(inside.normed)
    return _as_map(tower.leave(tower.merge(_attend(queries, values)), options), inside.grid)


def naclip(tower: ClipVit, images: Tensor, options: DenseOptions) -> Tensor:
    """Features as of `clearclip`, by softmax(s k k' + w), where w falls with distance."""
    inside = tower.enter_last(images, options)
    _, keys, values = tower.heads(inside.normed)
    nearness = F.pad(neighbourhood(inside.grid), (1, 0, 1, 0)).to(keys)
    attended = _attend(keys, values, bonus=nearness)
    return _as_map(tower.leave(tower.merge(attended), options), inside.grid)


def neighbourhood(grid: tuple[int, int]) -> Tensor:
    """exp(-d^2 / (2 * 5^2)) of all pairs of patches d patches apart, (h w, h w)."""
    rows, columns = (
        torch.exp(
            -((torch.arange(side)[:, None] - torch.arange(side)) ** 2) / (2 * NEIGHBOURHOOD**2)
        )
        for side in grid
    )
    return torch.kron(rows, columns)


FEATURES: dict[str, Features] = {
    "sclip": sclip,
    "clearclip": clearclip,
    "naclip": naclip,
    "scclip": scclip,
}


def _attend(alike: Tensor, values: Tensor, *, bonus: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(alike, alike, values, attn_mask=bonus)


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
