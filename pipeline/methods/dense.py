"""Dense labellers: what labels every pixel of an image by names, training-free.

A new one is a file in `pipeline/models/dense/` with its network, and here its params and an entry
in `DENSE_LABELLERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

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


class PseudoLabelParams(Section):
    """Stage 4: dense labels, training-free, by the method that `method` names."""

    method: str
    encoder: EncoderParams = EncoderParams()
    templates: Templates = "prompts85"
    batch_size: Count = 16
    workers: NumWorkers = 2
    shard_size: Count = 500

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the labels, but for the encoder."""
        return self.model_dump(
            mode="json", exclude={"method", "encoder", "batch_size", "workers", "shard_size"}
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
    """DenseCLIP with its encoder, as a stage."""

    method: Literal["denseclip"] = "denseclip"


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


DENSE_LABELLERS = {"denseclip": DenseMethod(DenseClipParams, _denseclip, gives_objects=True)}


def load_dense_labeller(params: PseudoLabelParams, names: Names, runtime: Runtime) -> DenseLabeller:
    """The dense labeller that the params are of.

    Raises:
        PipelineError: an encoder that cannot be loaded, or a name that it does not know.
    """
    return DENSE_LABELLERS[params.method].load(params, names, runtime)
