"""How archive samples become training images: settings, which need no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.params.base import Count, NonNegative, Positive, Probability, Section


def _ascending(values: list[float]) -> list[float]:
    if values != sorted(values):
        raise ValueError("Input should be in ascending order")
    return values


Range = Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(_ascending)]
Strengths = Annotated[
    list[NonNegative], Field(min_length=2, max_length=2), AfterValidator(_ascending)
]
# What becomes of the truth of a labelled set, see `AnnotatedPool`.
Truth = Literal["zero_shot", "annotation_free", "supervised", "adapted"]


class TargetSettings(Section):
    """What training sees of a sample, see `training_target`.

    `target` is `saliency`, `denseclip` or `fused`, where dense labels overrule at
    `confidence_threshold` and `conflict` says by what. `split_components` pastes every connected
    component of a pseudo-mask's objects as an object of its own.
    """

    target: Literal["saliency", "denseclip", "fused"] = "saliency"
    confidence_threshold: Probability = 0.5
    conflict: Literal["category", "ignore"] = "ignore"
    split_components: bool = False

    @property
    def needs_labels(self) -> bool:
        """Whether the target is made of dense labels."""
        return self.target != "saliency"


class Composition(Section):
    """How samples become a training image (ZUTIS paper, 3.2, 4.1 and appendix B.2).

    Images are resized by a factor of `scale_range` and cropped to `crop_size`; `flip`,
    `colour_jitter`, `greyscale` and `blur` are probabilities. One to `max_paste` archive images
    make a training image, all of one archive with probability `same_archive`. `negative_canvas` is
    the share of images whose canvas is one of the negatives of stage 2. `keep_last_row_column`
    pastes objects whole, where the published code cuts their last row and column off.
    """

    crop_size: Count = 384
    scale_range: Range = [0.1, 1.0]
    flip: Probability = 0.5
    colour_jitter: Probability = 0.8
    greyscale: Probability = 0.2
    blur: Probability = 0.5
    max_paste: Count = 10
    same_archive: Probability = 0.5
    negative_canvas: Probability = 0.0
    keep_last_row_column: bool = False


class Augmentation(Section):
    """How a whole image becomes a training image (DenseCLIP+, as MaskCLIP's configs have it).

    An image is fit into `base_size`, long and short side (null: its own size), times a factor of
    `scale_range`. A crop of side `crop_size` shows at most a share `max_share` of one label, if ten
    redraws can have it; void pixels do not count, unlabelled ones do. `flip` is a probability.
    Each change of colours has probability `photometric`: grey levels up to `brightness` are added,
    values are multiplied by a factor of `contrast`, their saturation by one of `saturation`, and
    the hue turns by up to `hue`, in 180ths of the colour circle.
    """

    crop_size: Count = 512
    base_size: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = [2048, 512]
    scale_range: Range = [0.5, 2.0]
    max_share: Probability = 0.75
    flip: Probability = 0.5
    photometric: Probability = 0.5
    brightness: Annotated[float, Field(ge=0.0, le=255.0)] = 32.0
    contrast: Strengths = [0.5, 1.5]
    saturation: Strengths = [0.5, 1.5]
    hue: Annotated[int, Field(ge=0, le=90)] = 18
