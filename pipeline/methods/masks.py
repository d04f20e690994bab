"""Mask sources: what makes the pseudo-mask of an image, or one for each of a few objects.

A new one is a file in `pipeline/models/masks/` with its network, and here its params and an entry
in `MASK_SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field

from pipeline.params.base import (
    Count,
    EncoderParams,
    NumWorkers,
    Positive,
    Probability,
    RelaxedPath,
    Section,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from pipeline.engine.runtime import Runtime


def _both_sides(value: Any) -> Any:
    """A side stands for height and width."""
    return [value, value] if isinstance(value, int) else value


# Height and width.
InputSize = Annotated[list[Count], Field(min_length=2, max_length=2), BeforeValidator(_both_sides)]


class MaskSource(Protocol):
    """What makes masks; it has loaded what it needs.

    One that tells objects apart also has `predict_objects`: images -> mask probabilities
    (B, N, H, W), the main object first, empty where there are fewer.

    Attributes:
        settings: all that its masks depend on besides the image; representable in JSON.
        max_pixels: larger images are shrunk for it, and the masks enlarged again.
        threshold: a pixel belongs to the mask where its probability exceeds this.
    """

    settings: dict[str, Any]
    max_pixels: int
    threshold: float

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> mask probabilities (B, H, W), on the CPU."""


class MaskLearner(Protocol):
    """What learns from archive images how to make masks.

    Attributes:
        settings: all that it learns depends on besides the images; representable in JSON.
        num_images: how many it wants, at most.
    """

    settings: dict[str, Any]
    num_images: int

    def learn(self, images: Iterable[Image.Image]) -> bytes:
        """What a source is loaded with, from RGB images."""


class MaskParams(Section):
    """Stage 3: one pseudo-mask per archive image, by the method that `source` names.

    `refine` snaps masks to edges by the bilateral solver, which the published code stops after 25
    `solver_iterations`, unconverged; below 1, `solver_scale` solves at that fraction of height and
    width, which is faster and less exact. `max_error_rate` is as in `embed`.
    """

    source: str
    refine: bool = True
    solver_iterations: Count = 25
    solver_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    short_side: Count = 512
    batch_size: Count = 16
    workers: NumWorkers = 2
    shard_size: Count = 500
    max_pixels: Count = 100_000_000
    max_error_rate: Probability = 0.01


class ObjectsParams(MaskParams):
    """A source that may give an image several masks, one for each of up to `objects` things.

    What the masks before leave is cut again by a normalised cut of patch features, of which two are
    alike where their cosine exceeds `tau`. It ends where a cut's value exceeds `max_cut`; parts
    below the share `min_area` of the image are left out.
    """

    objects: Annotated[int, Field(ge=1, le=3)] = 1
    tau: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.2
    max_cut: Positive = 0.9
    min_area: Probability = 0.01


class SelfMaskParams(ObjectsParams):
    """The network of `weights`, a file or a name of `pipeline weights list`."""

    source: Literal["selfmask"] = "selfmask"
    weights: RelaxedPath = Path("selfmask_nq20")
    threshold: Probability = 0.5


class FeatureParams(ObjectsParams):
    """A source of masks by `encoder`'s features (attention keys or tokens of its last block).

    The encoder may be any of open_clip's with a map (see docs/encoders.md), or `dino_vits8` or
    `dino_vits16` with `pretrained` empty for the published weights. A network without attention
    gives the output of its last stage for either facet. `precision` `bfloat16` computes features so
    on a CPU, too, which is faster and less exact; `device` leaves it to the device.
    """

    encoder: EncoderParams = EncoderParams()
    facet: Literal["key", "token"] = "key"
    precision: Literal["device", "bfloat16"] = "device"


class SpectralParams(FeatureParams):
    """Clusters of features that vote.

    Features are clustered at every k of `clusters`. Those of `more_encoders` are clustered, too,
    and all vote together.
    """

    source: Literal["spectral"] = "spectral"
    clusters: Annotated[list[Count], Field(min_length=1)] = [2, 3, 4]
    more_encoders: list[EncoderParams] = []


class CutParams(FeatureParams):
    """Normalised cuts of features, see `ObjectsParams`, from the first object on."""

    source: Literal["cut"] = "cut"


class FoundParams(FeatureParams):
    """A 1 x 1 convolution of features that learns from the votes of `learn_images` archive images.

    The votes are those of `spectral` with the same settings. It is learned by the stage itself, and
    again whenever these images, or what they vote for, may have changed.
    """

    source: Literal["found"] = "found"
    clusters: Annotated[list[Count], Field(min_length=1)] = [2, 3, 4]
    learn_images: Count = 200
    threshold: Probability = 0.5

    def votes(self) -> SpectralParams:
        """Settings of the votes."""
        shared = self.model_dump(include={"encoder", "facet", "precision", "clusters"})
        return SpectralParams(**shared)


class OnnxParams(MaskParams):
    """Any saliency network in ONNX's format, the file `weights`; needs the extra `photos`.

    Most are trained with masks that people drew, and then nothing that follows is unsupervised.

    Images get the network's input `size` (a side, or height and width; null: its own): with
    `resize` `stretch` whatever their shape, with `fit` in shape and centred on black. They are in
    [0, 1], less `mean`, over `std`. `output` is the name of the map that becomes the mask, empty
    for the first; its values are probabilities, or with `activation` `sigmoid` logits.
    """

    source: Literal["onnx"] = "onnx"
    weights: RelaxedPath
    size: InputSize | None = None
    mean: Annotated[list[float], Field(min_length=3, max_length=3)] = [0.485, 0.456, 0.406]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)] = [0.229, 0.224, 0.225]
    resize: Literal["stretch", "fit"] = "stretch"
    output: str = ""
    activation: Literal["none", "sigmoid"] = "none"
    threshold: Probability = 0.5


@dataclass(frozen=True)
class MaskMethod:
    """An entry of `MASK_SOURCES`.

    Attributes:
        params: the class of its params.
        load: what loads it by these, and by what was learned if it learns.
        learner: what learns from archive images first; None if nothing does.
    """

    params: type[MaskParams]
    load: Callable[..., MaskSource]
    learner: Callable[[Any, Runtime], MaskLearner] | None = None


def _selfmask(params: SelfMaskParams, runtime: Runtime) -> MaskSource:
    from pipeline.models.masks.selfmask import SelfMaskSource

    return SelfMaskSource(params, runtime)


def _spectral(params: SpectralParams, runtime: Runtime) -> MaskSource:
    from pipeline.models.masks.spectral import SpectralSource

    return SpectralSource(params, runtime)


def _cut(params: CutParams, runtime: Runtime) -> MaskSource:
    from pipeline.models.masks.cut import CutSource

    return CutSource(params, runtime)


def _found(params: FoundParams, runtime: Runtime, learned: bytes) -> MaskSource:
    from pipeline.models.masks.found import FoundSource

    return FoundSource(params, runtime, learned)


def _found_learner(params: FoundParams, runtime: Runtime) -> MaskLearner:
    from pipeline.models.masks.found import FoundLearner

    return FoundLearner(params, runtime)


def _onnx(params: OnnxParams, runtime: Runtime) -> MaskSource:
    from pipeline.models.masks.onnx_saliency import OnnxSource

    return OnnxSource(params, runtime)


MASK_SOURCES = {
    "selfmask": MaskMethod(SelfMaskParams, _selfmask),
    "spectral": MaskMethod(SpectralParams, _spectral),
    "cut": MaskMethod(CutParams, _cut),
    "found": MaskMethod(FoundParams, _found, _found_learner),
    "onnx": MaskMethod(OnnxParams, _onnx),
}


def load_mask_learner(params: MaskParams, runtime: Runtime) -> MaskLearner | None:
    """What learns from archive images before the source of the params is loaded, if anything does.

    Raises:
        PipelineError: its encoder cannot be loaded.
    """
    learner = MASK_SOURCES[params.source].learner
    return learner(params, runtime) if learner else None


def load_mask_source(
    params: MaskParams, runtime: Runtime, learned: bytes | None = None
) -> MaskSource:
    """The mask source that the params are of, with what its learner has learned, if it has one.

    Raises:
        PipelineError: its weights or encoder cannot be loaded.
    """
    load = MASK_SOURCES[params.source].load
    return load(params, runtime) if learned is None else load(params, runtime, learned)
