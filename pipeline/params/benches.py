"""Entries of `benches`, one section a format, and what a student may be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pipeline.params.base import Count, RelaxedPath, Rounding, Section
from pipeline.params.sources import SourceParams


class CorruptionParams(Section):
    """A disturbance of the images of a benchmark (DenseCLIP, robustness): name and level 1 to 5."""

    name: str
    level: Annotated[int, Field(ge=1, le=5)]


class BenchSection(Section):
    """What every benchmark has: folder, split, category list and protocol.

    `categories` is a shipped set's name or a list, in the order of the label ids. `scored` names
    those of them that are asked for and scored, all if it is empty: objects of the others are
    background. Without
    `background`, label id 0 is neither predicted nor scored. `metrics` says what is scored:
    `semantic` masks, `instance` masks, semantic masks by object `size`. The categories of `unseen`
    are scored apart from the others. `groups` maps a name to an image list of the benchmark that is
    scored apart as well. `resize_to` and `max_side` go before those of section `evaluate`;
    `rounding` is that of the sides of a resized image. A `corruption` sees the channels of an image
    in the order `corruption_channels`. Settings are chosen on a benchmark for `development`: an
    ablation scores on it first, and the report leaves its scores out. No score depends on that, so
    that no dump of a section has it.
    """

    root: RelaxedPath
    split: str = "val"
    categories: str | list[str] = "voc"
    scored: list[str] = []
    background: bool = True
    metrics: Annotated[list[Literal["semantic", "instance", "size"]], Field(min_length=1)] = [
        "semantic"
    ]
    unseen: list[str] = []
    groups: dict[str, str] = {}
    corruption: CorruptionParams | None = None
    corruption_channels: Literal["rgb", "bgr"] = "rgb"
    resize_to: Count | None = None
    max_side: Count | None = None
    rounding: Rounding = "down"
    development: Annotated[bool, Field(exclude=True)] = False

    def layout(self) -> dict[str, Any]:
        """The settings that only the reader of this format takes."""
        return self.model_dump(exclude={*BenchSection.model_fields, "format"})


class VocBench(BenchSection):
    """PASCAL VOC's layout; `split` is a file of `ImageSets/Segmentation`.

    Masks of objects are read for the metric `instance` only.
    """

    format: Literal["voc"]
    metrics: Annotated[list[Literal["semantic", "instance", "size"]], Field(min_length=1)] = [
        "semantic",
        "instance",
    ]

    def layout(self) -> dict[str, Any]:
        return {"objects": "instance" in self.metrics}


class IndexPngBench(BenchSection):
    """Images in one folder, index PNGs in another; `{split}` in a path stands for the split.

    `image_list` is a file of one id a line; empty: every file of `labels`. `values` are the pixel
    values of label ids 1, 2, ... (empty: the label ids themselves); pixels of `void_values` are
    never scored, all other values are `other`.
    """

    format: Literal["index_png"]
    images: str
    labels: str
    image_list: str = ""
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
    values: list[int] = []
    void_values: list[int] = [255]
    other: Literal["background", "void"] = "background"


class CocoBench(BenchSection):
    """COCO's instance annotations; label maps are painted from them.

    `{split}` in a path stands for the split. `image_list` names the images that are scored, one
    file name a line; empty: all.
    """

    format: Literal["coco"]
    annotations: str = "annotations/instances_{split}.json"
    images: str = "{split}"
    image_list: str = ""
    categories: str | list[str] = "coco"


class CocaBench(BenchSection):
    """CoCA: one folder of images and one of binary masks per category."""

    format: Literal["coca"]
    categories: str | list[str] = "coca"


class ImageNetSBench(BenchSection):
    """ImageNet-S: label ids over two channels of a PNG; `split` is `validation` or `test`."""

    format: Literal["imagenet_s"]
    split: str = "validation"


class CubBench(BenchSection):
    """CUB-200-2011: every image is asked for one name only, `bird` or that of its `breed`."""

    format: Literal["cub"]
    split: Literal["train", "test"] = "test"
    categories: str | list[str] = ["bird"]
    names: Literal["bird", "breed"] = "bird"


BenchParams = Annotated[
    VocBench | IndexPngBench | CocoBench | CocaBench | ImageNetSBench | CubBench,
    Field(discriminator="format"),
]
FORMATS = {
    "voc": VocBench,
    "index_png": IndexPngBench,
    "coco": CocoBench,
    "coca": CocaBench,
    "imagenet_s": ImageNetSBench,
    "cub": CubBench,
}

ARCHIVES = "archives"
DATA_FORMATS = {**dict.fromkeys(("folder", "webdataset", "parquet"), SourceParams), **FORMATS}


def _kind_of_data(value: Any) -> str | None:
    """The tag of a branch of `TrainingDataParams`: `archives`, or the format of a section."""
    if isinstance(value, str):
        return value if value == ARCHIVES else repr(value)
    kind = value.get("format") if isinstance(value, Mapping) else getattr(value, "format", None)
    return None if kind is None else str(kind)


# The images of the masks' archives, a pool without truth, or a labelled set.
TrainingDataParams = Annotated[
    Annotated[Literal["archives"], Tag(ARCHIVES)]
    | Annotated[SourceParams, Tag("folder")]
    | Annotated[SourceParams, Tag("webdataset")]
    | Annotated[SourceParams, Tag("parquet")]
    | Annotated[VocBench, Tag("voc")]
    | Annotated[IndexPngBench, Tag("index_png")]
    | Annotated[CocoBench, Tag("coco")]
    | Annotated[CocaBench, Tag("coca")]
    | Annotated[ImageNetSBench, Tag("imagenet_s")]
    | Annotated[CubBench, Tag("cub")],
    Discriminator(_kind_of_data),
]
