"""Dense labellers: what labels every pixel of an image by names, training-free.

A new one is a file in `pipeline/models/dense/` with its network, and here its params and an entry
in `DENSE_LABELLERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import model_validator

from pipeline.params.base import (
    Count,
    EncoderParams,
    NumWorkers,
    Positive,
    Probability,
    Section,
    Templates,
)
from pipeline.vocabulary.categories import Names

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.engine.runtime import Runtime


class DenseLabeller(Protocol):
    """What labels pixels with the names that it was loaded with; label id 0 is the background.

    Attributes:
        patch_size: side in pixels of what one score stands for.
    """

    patch_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """All that its labels depend on besides image and names; representable in JSON."""

    @property
    def logit_scale(self) -> float | None:
        """Factor of the scores in their softmax; None where they are probabilities."""

    def select(self, label_ids: Sequence[int]) -> Self:
        """The same for some label ids, in this order; it shares the networks."""

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, K, h, w) float32 of the K label ids."""

    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> numbers of label ids (B, H, W), confidence (B, H, W)."""


class ObjectLabeller(DenseLabeller, Protocol):
    """A dense labeller that can tell how well a region fits its name (`gives_objects`).

    Attributes:
        text: (K, C) unit rows of the K label ids.
    """

    text: Tensor

    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `scores` gives, and features (B, C, h, w) float32, of any length, beside `text`."""


OPTIONS = ("stitch",)


class StitchParams(Section):
    """Windows up to the last block of CLIP's ViT, of `side` pixels and `stride` pixels apart."""

    side: Count
    stride: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride > self.side:
            raise ValueError(
                f"stride: {self.stride} leaves gaps between windows of side: {self.side}; "
                "take at most the side, such as half of it"
            )
        return self


class PseudoLabelParams(Section):
    """Stage 4: dense labels, training-free, by the method that `method` names."""

    method: str
    encoder: EncoderParams = EncoderParams()
    templates: Templates = "prompts85"
    batch_size: Count = 16
    workers: NumWorkers = 2
    shard_size: Count = 500

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the labels, but for the encoder; of `OPTIONS` those that are on.

        So what is known of labels without them reads as before.
        """
        off = {name for name in OPTIONS if getattr(self, name, None) is None}
        return self.model_dump(
            mode="json", exclude={"method", "encoder", "batch_size", "workers", "shard_size", *off}
        )


class DenseClipRecipe(Section):
    """DenseCLIP, later named MaskCLIP, but for its encoder and its names.

    `prompt_denoising` and `key_smoothing` are the thresholds of the two refinements; null is off.
    `published_activation` keeps MaskCLIP's exact GELU and layer-norm eps of 1e-6 where CLIP has
    QuickGELU and 1e-5. `dense_attention` `maskclip` keeps residual and MLP of the last block, as
    the code does; `value_only` is the paper's text. `key_affinity` `published` keeps what the code
    does to the keys of key smoothing; `cosine` averages by their positive cosines.
    `position_resize` `size` takes positions as they are wherever their number is right, as the code
    does; `grid` where their grid is. `normalisation` is ImageNet's in the code, though not in CLIP.
    These are about CLIP's own ViT and ResNet, as are the slips: other towers do without, with the
    statistics that they were trained with, and what they lack is refused (docs/encoders.md).
    """

    prompt_denoising: Probability | None = None
    key_smoothing: Probability | None = None
    key_affinity: Literal["published", "cosine"] = "published"
    published_activation: bool = True
    dense_attention: Literal["maskclip", "value_only"] = "maskclip"
    normalisation: Literal["imagenet", "clip"] = "imagenet"
    position_resize: Literal["size", "grid"] = "size"
    logit_scale: Positive = 100.0


class DenseClipParams(DenseClipRecipe, PseudoLabelParams):
    """DenseCLIP with its encoder, as a stage; `stitch` is null for the whole image at once."""

    method: Literal["denseclip"] = "denseclip"
    stitch: StitchParams | None = None


class AttentionParams(PseudoLabelParams):
    """What labellers with another attention in the last block of CLIP's own ViT share.

    As in `DenseClipRecipe`, but without the slips of DenseCLIP's code unless they are asked for.
    """

    prompt_denoising: Probability | None = None
    published_activation: bool = False
    normalisation: Literal["imagenet", "clip"] = "clip"
    position_resize: Literal["size", "grid"] = "grid"
    logit_scale: Positive = 100.0
    stitch: StitchParams | None = None


class SclipParams(AttentionParams):
    """SCLIP: attention of queries to queries, and of keys to keys, summed."""

    method: Literal["sclip"] = "sclip"


class ClearClipParams(AttentionParams):
    """ClearCLIP: attention of queries to queries, without residual and MLP."""

    method: Literal["clearclip"] = "clearclip"


class NaClipParams(AttentionParams):
    """NACLIP: attention of keys to keys with a bonus for near patches, without residual and MLP."""

    method: Literal["naclip"] = "naclip"


class ScClipParams(AttentionParams):
    """SC-CLIP: outliers repaired, tokens averaged where blocks in the middle are alike."""

    method: Literal["scclip"] = "scclip"


class ProxyClipParams(AttentionParams):
    """ProxyCLIP: attention where the tokens of `dino`, in its own grid, are alike.

    `dino` is an encoder as `mask.encoder` of spectral masks has it; null takes the keys of the last
    block of `encoder` instead. `facet` is that of `dino`.
    """

    method: Literal["proxyclip"] = "proxyclip"
    dino: EncoderParams | None = EncoderParams(model="dino_vits8", pretrained="")
    facet: Literal["key", "token"] = "token"

    def recipe(self) -> dict[str, Any]:
        """As of all; of `dino` the names without folders, for its weights are in the settings."""
        return super().recipe() | {"dino": self.dino.tag if self.dino else None}


@dataclass(frozen=True)
class DenseMethod:
    """An entry of `DENSE_LABELLERS`.

    Attributes:
        params: the class of its params.
        load: loads it by these.
        gives_objects: whether what is loaded is an `ObjectLabeller`, whose regions are objects too.
    """

    params: type[PseudoLabelParams]
    load: Callable[[Any, Names, Runtime], DenseLabeller]
    gives_objects: bool = False


def _denseclip(params: DenseClipParams, names: Names, runtime: Runtime) -> DenseLabeller:
    from pipeline.models.dense.denseclip import load_denseclip

    return load_denseclip(params, names, runtime)


def _attention(params: AttentionParams, names: Names, runtime: Runtime) -> DenseLabeller:
    from pipeline.models.dense.attentions import load_attention_labeller

    return load_attention_labeller(params, names, runtime)


def _proxyclip(params: ProxyClipParams, names: Names, runtime: Runtime) -> DenseLabeller:
    from pipeline.models.dense.proxyclip import load_proxyclip

    return load_proxyclip(params, names, runtime)


DENSE_LABELLERS = {
    "denseclip": DenseMethod(DenseClipParams, _denseclip, gives_objects=True),
    "sclip": DenseMethod(SclipParams, _attention, gives_objects=True),
    "clearclip": DenseMethod(ClearClipParams, _attention, gives_objects=True),
    "naclip": DenseMethod(NaClipParams, _attention, gives_objects=True),
    "proxyclip": DenseMethod(ProxyClipParams, _proxyclip, gives_objects=True),
    "scclip": DenseMethod(ScClipParams, _attention, gives_objects=True),
}


def load_dense_labeller(params: PseudoLabelParams, names: Names, runtime: Runtime) -> DenseLabeller:
    """The dense labeller that the params are of.

    Raises:
        PipelineError: an encoder that cannot be loaded, or a name that it does not know.
    """
    return DENSE_LABELLERS[params.method].load(params, names, runtime)
