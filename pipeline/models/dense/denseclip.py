"""DenseCLIP, later named MaskCLIP (Zhou, Loy, Dai: "Extract Free Dense Labels from CLIP", 2022).

CLIP's image encoder labels every patch without training: its last attention is replaced by the
value path, and the patch features are compared with text embeddings. Sections are those of the
first version, arXiv 2112.01071v1, where nothing else is said. Not to be confused with the
supervised DenseCLIP of Rao et al.

Letters: B images, H W pixels, h w patch grid, D tower width, C joint embedding, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.models.clip import (
    ClipEncoder,
    ClipVit,
    DenseAttention,
    DenseOptions,
    DenseTower,
    Windows,
    dense_tower,
    load_clip,
)
from pipeline.models.clip.labels import label_embeddings
from pipeline.models.clip.tokens import PositionResize
from pipeline.models.dense.labels import LOGIT_SCALE, label_and_confidence
from pipeline.vocabulary.prompts import templates

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.dense import (
        AttentionParams,
        DenseClipSection,
        PseudoLabelParams,
        WindowParams,
    )
    from pipeline.vocabulary.categories import Names

KeyAffinity = Literal["published", "cosine"]

REMOVED_LOGIT = -100.0


class ClipLabeller(nn.Module):
    """What dense labellers that compare CLIP's features with its texts have in common.

    Attributes:
        visual: the image tower.
        patch_size: pixels, along a side, that a score stands for.
        params: its options.
        options: those of the tower.
        text: (K, C) unit rows by label id.
        gives_pixels: scores are of patches.
    """

    mean: Tensor
    std: Tensor
    text: Tensor
    gives_pixels = False

    def __init__(
        self, encoder: ClipEncoder, text: Tensor, params: DenseClipSection | AttentionParams
    ) -> None:
        """Put an encoder and label embeddings together.

        Args:
            encoder: its image tower is used.
            text: (K, C) unit rows by label id.
            params: normalisation, windows, and what differs between papers and code.

        Raises:
            PipelineError: the tower has no map, or no windows of that size.
        """
        super().__init__()
        self.visual = encoder.visual
        self.patch_size = encoder.patch_size
        self.params = params
        self.options = DenseOptions(
            published_activation=params.published_activation,
            position_resize=params.position_resize,
            windows=_windows(encoder.tower, params.stitch),
        )
        self.encoder = encoder
        for name, values in zip(
            ("mean", "std"), encoder.statistics(params.normalisation), strict=True
        ):
            buffer = torch.tensor(values, device=encoder.mean.device).view(1, 3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        self.register_buffer("text", text.to(encoder.mean.device), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """All that labels depend on besides image and names."""
        return {
            "method": self.params.method,
            **self.params.recipe(),
            "weights": self.encoder.fingerprint(),
        }

    @property
    def logit_scale(self) -> float | None:
        """Factor of the scores in their softmax."""
        return self.params.logit_scale

    def with_text(self, text: Tensor) -> Self:
        """The same with other unit rows (K, C)."""
        return type(self)(self.encoder, text, self.params).eval()

    def select(self, label_ids: Sequence[int]) -> Self:
        """The same for some label ids, in this order."""
        return self.with_text(self.text[list(label_ids)])

    def embed(self, names: Names, templates: Sequence[str]) -> Tensor:
        """Unit rows (1 + K, C) of names in some templates, see `label_embeddings`."""
        return label_embeddings(self.encoder, names, templates)

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, K, h, w), see `forward`."""
        scores: Tensor = self(images)
        return scores

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, K, h, w), float32: cosines."""
        return self.scores_and_features(images)[0]

    def features(self, images: Tensor) -> Tensor:
        """The features (B, C, h, w) behind the scores, float32."""
        return self.scores_and_features(images)[1]

    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as `forward` gives them, and the features (B, C, h, w) behind them, float32."""
        raise NotImplementedError

    @torch.no_grad()
    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> label ids (B, H, W) int64, confidence (B, H, W)."""
        height, width = images.shape[-2:]
        return label_and_confidence(self(images), (height, width), scale=self.logit_scale)

    def normalise(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the network's input."""
        return (images - self.mean) / self.std

    def compare(self, features: Tensor) -> Tensor:
        """Cosines (B, K, h, w) of features (B, C, h, w) with the texts, denoised if that is on."""
        # They are multiplied by 100 before their softmax: float32 even where CLIP ran in less.
        with torch.autocast(features.device.type, enabled=False):
            scores = dense_logits(features, self.text)
            if self.params.prompt_denoising is not None:
                scale = self.params.logit_scale
                scores = prompt_denoising(scores, self.params.prompt_denoising, scale=scale)
        return scores


class DenseClip(ClipLabeller):
    """Training-free dense labels for images: normalisation, value path, cosines, refinements.

    Scores are cosines; after key smoothing, smoothed probabilities.
    """

    params: DenseClipSection

    def __init__(self, encoder: ClipEncoder, text: Tensor, params: DenseClipSection) -> None:
        """See `ClipLabeller`.

        Raises:
            PipelineError: the tower has no map, or not what the params ask for.
        """
        super().__init__(encoder, text, params)
        _check_options(encoder.tower, params)
        self.options = replace(self.options, dense_attention=params.dense_attention)

    @property
    def logit_scale(self) -> float | None:
        """Factor of the scores in their softmax; None after key smoothing."""
        return self.params.logit_scale if self.params.key_smoothing is None else None

    @torch.no_grad()
    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as `forward` gives them, and the features (B, C, h, w) behind them, float32."""
        features, keys = self.encoder.tower.dense(self.normalise(images), self.options)
        scores = self.compare(features)
        if self.params.key_smoothing is not None and keys is not None:
            with torch.autocast(features.device.type, enabled=False):
                scores = key_smoothing(
                    scores,
                    keys,
                    self.params.key_smoothing,
                    affinity=self.params.key_affinity,
                    scale=self.params.logit_scale,
                )
        return scores, features


def load_denseclip(params: DenseClipSection, names: Names, runtime: Runtime) -> DenseClip:
    """DenseCLIP with the encoder of its params, for some names.

    Raises:
        PipelineError: an encoder that cannot be loaded or lacks what the params ask for, or a name
            that it does not know.
    """
    encoder, text = load_encoder_and_text(params, names, runtime)
    return DenseClip(encoder, text, params).eval()


def load_encoder_and_text(
    params: PseudoLabelParams, names: Names, runtime: Runtime
) -> tuple[ClipEncoder, Tensor]:
    """The encoder of some params, and its embeddings (K, C) of the names; see `load_denseclip`."""
    encoder = load_clip(
        params.encoder, runtime.device, cache_dir=runtime.cache_dir, field="pseudo_label.encoder"
    )
    return encoder, label_embeddings(encoder, names, templates(params.templates))


def dense_features(
    visual: nn.Module,
    images: Tensor,
    *,
    published_activation: bool = True,
    dense_attention: DenseAttention = "maskclip",
    position_resize: PositionResize = "size",
) -> tuple[Tensor, Tensor | None]:
    """Patch features in the joint embedding space (section 3.3), and the keys of the same layer.

    The idea is that of what the tower's pooling does to one position: see `DenseTower`. The options
    concern CLIP's own ViT alone.

    Args:
        visual: image tower of a model of open_clip.
        images: (B, 3, H, W), normalised; zero-padded right and bottom to a multiple of the patch.
        published_activation: see `DenseOptions`.
        dense_attention: see `DenseOptions`. No effect on a ResNet, which has no residual.
        position_resize: see `resize_positions`. No effect on a ResNet, whose position embeddings
            are not used.

    Returns:
        Features (B, C, h, w), not normalised, and keys (B, h w, D) where the tower has any, both
        float32. As in the published code the keys of a ViT's last block pass the output projection
        too, those of an attention pooling do not.

    Raises:
        PipelineError: the image tower has no map.
    """
    options = DenseOptions(
        published_activation=published_activation,
        dense_attention=dense_attention,
        position_resize=position_resize,
    )
    return dense_tower(visual).dense(images, options)


def _windows(tower: DenseTower, stitch: WindowParams | None) -> Windows | None:
    """Windows in patches.

    Raises:
        PipelineError: the tower has no attention to stitch for, or patches do not fill them.
    """
    if stitch is None:
        return None
    if not isinstance(tower, ClipVit):
        raise PipelineError(
            "pseudo_label.stitch: windows are put together before the last block of CLIP's own "
            f"ViT, but the encoder is {tower.describe()}; set it to null"
        )
    patch = tower.patch_size
    for name, pixels in (("side", stitch.side), ("stride", stitch.stride)):
        if pixels % patch:
            raise PipelineError(
                f"pseudo_label.stitch.{name}: {pixels} is no multiple of the encoder's patch of "
                f"{patch} pixels; use {math.ceil(pixels / patch) * patch}"
            )
    return Windows(stitch.side // patch, stitch.stride // patch)


def _check_options(tower: DenseTower, params: DenseClipSection) -> None:
    """Refuse what a tower cannot do.

    Raises:
        PipelineError: names the option.
    """
    if params.key_smoothing is not None and not tower.has_keys:
        raise PipelineError(
            f"pseudo_label.key_smoothing: {params.key_smoothing}, but the encoder "
            f"({tower.describe()}) averages its map and has no attention keys; set it to null"
        )
    if params.dense_attention == "value_only" and not tower.published:
        raise PipelineError(
            "pseudo_label.dense_attention: value_only is for CLIP's own ViT, but the encoder is "
            f"{tower.describe()}; use maskclip"
        )


def dense_logits(features: Tensor, text: Tensor) -> Tensor:
    """Cosines (B, K, h, w) of features (B, C, h, w) with unit text embeddings (K, C)."""
    return torch.einsum("bchw,kc->bkhw", features / features.norm(dim=1, keepdim=True), text)


def prompt_denoising(logits: Tensor, threshold: float, *, scale: float = LOGIT_SCALE) -> Tensor:
    """Remove from each image the labels it nowhere believes in.

    From section 3.3 of MaskCLIP (ECCV 2022), as `key_smoothing`; DenseCLIP's first version has
    neither.

    A label whose largest softmax(scale * logit) over all positions is below the threshold gets
    logit -100 everywhere. If that removes every label, label 0 wins.

    Args:
        logits: cosines (B, K, h, w).
        threshold: in [0, 1]; 0.5 there.
        scale: factor of the cosines inside the softmax.
    """
    peaks = (scale * logits).softmax(dim=1).amax(dim=(2, 3), keepdim=True)
    return logits.masked_fill(peaks < threshold, REMOVED_LOGIT)


def key_smoothing(
    logits: Tensor,
    keys: Tensor,
    threshold: float,
    *,
    affinity: KeyAffinity = "published",
    scale: float = LOGIT_SCALE,
) -> Tensor:
    """Spread probabilities between positions with similar keys; see `prompt_denoising`.

    Args:
        logits: cosines (B, K, h, w), after prompt denoising if both are on.
        keys: (B, h w, D).
        threshold: positions whose largest probability reaches it keep their probabilities.
        affinity: how much a position counts for another. "published", as in the code: each key
            channel is normalised over the positions (not each key), and the Gram matrix is neither
            a softmax nor row-normalised, so the result is no distribution. "cosine": of the two
            keys, negative ones cut off, divided by the sum over all positions, so probabilities
            stay probabilities.
        scale: factor of the cosines inside the softmax.

    Returns:
        (B, K, h, w).
    """
    probabilities = (scale * logits).softmax(dim=1).flatten(2)
    keys = F.normalize(keys, dim=1 if affinity == "published" else 2)
    weights = keys @ keys.transpose(1, 2)  # symmetric
    if affinity == "cosine":
        weights = F.normalize(weights.clamp(min=0), p=1, dim=1)
    smoothed = probabilities @ weights
    uncertain = probabilities.amax(dim=1, keepdim=True) < threshold
    return torch.where(uncertain, smoothed, probabilities).unflatten(2, logits.shape[-2:])
