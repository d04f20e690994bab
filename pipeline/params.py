"""The typed content of params.yaml: one frozen section per stage, and its only reader.

Defaults are the papers' settings. An unknown key, a value of the wrong type or out of its range is
a `PipelineError` that names the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    ValidationError,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import PipelineError
from pipeline.files import as_location

RelaxedPath = Annotated[Path, Strict(False)]
# A path or a URL, see `pipeline.files.as_location`.
RelaxedLocation = Annotated[Any, BeforeValidator(as_location), PlainSerializer(str)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Workers = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# Names of entries become file names and words of commands (dvc.yaml).
EntryName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Text = Annotated[str, Field(pattern=r"\S")]


def _ascending(values: list[float]) -> list[float]:
    if values != sorted(values):
        raise ValueError("Input should be in ascending order")
    return values


class Section(BaseModel):
    """A group of params: frozen, strict, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EncoderParams(Section):
    """A CLIP model.

    `model` is an open_clip architecture or a model-config JSON file; `pretrained` an open_clip tag,
    a weights file, or a name of `pipeline weights list`. For `mask.encoder`, `model` may also be
    `dino_vits8` or `dino_vits16`, with `pretrained` empty for the published weights.
    """

    model: str = "ViT-B-16-quickgelu"
    pretrained: str = "openai"


class SourceParams(Section):
    """One pool of unlabelled images.

    `folder`: a tree of image files below `root`. `webdataset`: tars below `root` that match
    `pattern` (braces allowed). `parquet`: files below `root` that match `pattern`, with a column of
    image bytes. `root` may be a URL that fsspec knows: s3://bucket/folder, gs://bucket/folder.
    """

    format: Literal["folder", "webdataset", "parquet"] = "folder"
    root: RelaxedLocation
    pattern: str = ""


class EmbedParams(Section):
    """Stage 1: image embeddings of the index dataset.

    The stage fails if more than `max_error_rate` of the images, and more than ten, cannot be read.
    """

    encoder: EncoderParams = EncoderParams(model="ViT-L-14-336-quickgelu")
    batch_size: Count = 64
    shard_size: Count = 10_000
    workers: Workers = 2
    max_pixels: Count = 100_000_000
    max_error_rate: Probability = 0.01


class RetrieveParams(Section):
    """Stage 2: the top-k images of each category.

    `overlap` settles an image that several categories want: `best` gives it to the most similar
    one, `all` keeps it in each, `last` gives it to the last category of the list (the published
    code). `num_negatives` images, those nearer to a name of the background than to any category,
    form an archive 0 that training may use as background (0: none, as published). `search` `exact`
    runs over all embeddings, `block_rows` at a time; `ivf` builds an approximate index of them once
    and looks at `probes` of its lists: for pools of millions that are searched again and again.
    """

    templates: Literal["prompts85", "name"] = "prompts85"
    overlap: Literal["best", "all", "last"] = "last"
    num_negatives: Annotated[int, Field(ge=0)] = 0
    search: Literal["exact", "ivf"] = "exact"
    probes: Count = 64
    block_rows: Count = 16_384


class MaskParams(Section):
    """Stage 3: one pseudo-mask per archive image.

    `selfmask` runs the network of `weights`, a file or a name of `pipeline weights list`;
    `spectral` clusters features of `encoder` (attention keys or tokens of its last block) at every
    k of `clusters` and lets the clusters vote. `refine` snaps masks to edges by the bilateral
    solver, which the published code stops after 25 `solver_iterations`, unconverged; below 1,
    `solver_scale` solves at that fraction of height and width, which is faster and less exact.
    `max_error_rate` is as in `embed`.
    """

    source: Literal["selfmask", "spectral"] = "selfmask"
    weights: RelaxedPath = Path("selfmask_nq20")
    encoder: EncoderParams = EncoderParams()
    facet: Literal["key", "token"] = "key"
    clusters: Annotated[list[Count], Field(min_length=1)] = [2, 3, 4]
    threshold: Probability = 0.5
    refine: bool = True
    solver_iterations: Count = 25
    solver_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    short_side: Count = 512
    batch_size: Count = 16
    workers: Workers = 2
    shard_size: Count = 500
    max_pixels: Count = 100_000_000
    max_error_rate: Probability = 0.01


class PseudoLabelParams(Section):
    """Stage 4: dense labels by DenseCLIP, training-free.

    `prompt_denoising` and `key_smoothing` are the thresholds of the two refinements; null is off.
    `published_activation` keeps MaskCLIP's exact GELU and layer-norm eps of 1e-6 where CLIP has
    QuickGELU and 1e-5. `dense_attention` `maskclip` keeps residual and MLP of the last block, as
    the code does; `value_only` is the paper's text. `key_affinity` `published` keeps what the code
    does to the keys of key smoothing; `cosine` averages by their positive cosines.
    `position_resize` `size` takes positions as they are wherever their number is right, as the code
    does; `grid` where their grid is. `normalisation` is ImageNet's in the code, though not in CLIP.
    """

    encoder: EncoderParams = EncoderParams()
    templates: Literal["prompts85", "name"] = "prompts85"
    prompt_denoising: Probability | None = None
    key_smoothing: Probability | None = None
    key_affinity: Literal["published", "cosine"] = "published"
    published_activation: bool = True
    dense_attention: Literal["maskclip", "value_only"] = "maskclip"
    normalisation: Literal["imagenet", "clip"] = "imagenet"
    position_resize: Literal["size", "grid"] = "size"
    logit_scale: Positive = 100.0
    batch_size: Count = 16
    workers: Workers = 2
    shard_size: Count = 500

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the labels, but for the encoder."""
        return self.model_dump(
            mode="json", exclude={"encoder", "batch_size", "workers", "shard_size"}
        )


class TrainParams(Section):
    """Stage 5: ZUTIS on the pseudo-labels.

    `target` is what training sees: `saliency`, `denseclip` or `fused`, where DenseCLIP overrules at
    `confidence_threshold` and `conflict` says by what. `templates` `name` embeds bare names, as the
    published code does; the paper's text says prompts. `logit_scale` multiplies the cosines in the
    cross-entropy (1 as published). `negative_canvas` is the share of images whose canvas is one of
    the negatives of stage 2; `split_components` pastes every connected component of a pseudo-mask
    as an object of its own. `keep_last_row_column` pastes objects whole, where the published code
    cuts their last row and column off.

    Three defaults are part of what published weights expect, and so of a checkpoint: inputs with
    ImageNet's `normalisation` where CLIP has its own (`clip`), positions resized by a factor
    slightly off (`position_resize` `scale`; `grid` is exact), and a layer norm of the projected
    tokens over the whole map (`token_norm` `map`; `token`: each by itself, `none`: as in CLIP).
    `mask_loss_reduction` `sum` adds up pairs and layers, as published; `mean` averages them.
    `matching` says where proposals and objects are compared before they are matched: at all
    `pixels`, as published, or, faster, at 64 x 64 random `points` or on the grid of the `tokens`.

    `batch_size` is that of an update of the weights, over all processes. `accumulate` takes it in
    so many parts, one after the other, which needs less memory and changes nothing but rounding.
    """

    encoder: EncoderParams = EncoderParams()
    target: Literal["saliency", "denseclip", "fused"] = "saliency"
    confidence_threshold: Probability = 0.5
    conflict: Literal["category", "ignore"] = "ignore"
    templates: Literal["prompts85", "name"] = "name"
    iterations: Count = 20_000
    batch_size: Count = 8
    accumulate: Count = 1
    crop_size: Count = 384
    scale_range: Annotated[
        list[Positive], Field(min_length=2, max_length=2), AfterValidator(_ascending)
    ] = [0.1, 1.0]
    flip: Probability = 0.5
    colour_jitter: Probability = 0.8
    greyscale: Probability = 0.2
    blur: Probability = 0.5
    max_paste: Count = 10
    same_archive: Probability = 0.5
    negative_canvas: Probability = 0.0
    split_components: bool = False
    keep_last_row_column: bool = False
    learning_rate: Positive = 5e-5
    encoder_learning_rate: Positive = 5e-6
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    ce_weight: Annotated[float, Field(ge=0.0)] = 1.0
    mask_weight: Annotated[float, Field(ge=0.0)] = 1.0
    mask_loss_reduction: Literal["sum", "mean"] = "sum"
    matching: Literal["pixels", "points", "tokens"] = "pixels"
    logit_scale: Positive = 1.0
    stop_gradient: bool = True
    normalisation: Literal["imagenet", "clip"] = "imagenet"
    position_resize: Literal["scale", "grid"] = "scale"
    token_norm: Literal["map", "token", "none"] = "map"
    num_queries: Count = 100
    decoder_layers: Count = 6
    num_heads: Count = 8
    feedforward_dim: Count = 2048
    workers: Workers = 2
    log_every: Count = 20
    checkpoint_every: Count = 1000


class EvaluateParams(Section):
    """Stage 6: prediction and scores on the benchmarks.

    `resize_to` brings the short side of an image to this many pixels before the network, `max_side`
    bounds its long side; predictions return to the original size. `whole_patches` resizes an image
    to whole patches, where the published code drops the rest at the right and bottom and stretches
    the prediction. `score_resolution` `token` labels and scores objects on the token grid, as the
    published code does; `pixel` over their final masks.
    """

    threshold: Probability = 0.5
    suppression: Literal["none", "hard", "linear", "gaussian"] = "hard"
    temperature: Positive = 5.0
    score_resolution: Literal["token", "pixel"] = "token"
    resize_to: Count | None = None
    max_side: Count | None = None
    whole_patches: bool = False
    batch_size: Count = 1
    overlays: Annotated[int, Field(ge=0)] = 24
    max_error_rate: Probability = 0.01


class CorruptionParams(Section):
    """A disturbance of the images of a benchmark (DenseCLIP, robustness): name and level 1 to 5."""

    name: str
    level: Annotated[int, Field(ge=1, le=5)]


class BenchSection(Section):
    """What every benchmark has: folder, split, category list and protocol.

    `categories` is a shipped set's name or a list, in the order of the label ids. Without
    `background`, label id 0 is neither predicted nor scored. `metrics` says what is scored:
    `semantic` masks, `instance` masks, semantic masks by object `size`. The categories of `unseen`
    are scored apart from the others. `groups` maps a name to an image list of the benchmark that is
    scored apart as well. `resize_to` and `max_side` go before those of section `evaluate`.
    """

    root: RelaxedPath
    split: str = "val"
    categories: str | list[str] = "voc"
    background: bool = True
    metrics: Annotated[list[Literal["semantic", "instance", "size"]], Field(min_length=1)] = [
        "semantic"
    ]
    unseen: list[str] = []
    groups: dict[str, str] = {}
    corruption: CorruptionParams | None = None
    resize_to: Count | None = None
    max_side: Count | None = None

    def layout(self) -> dict[str, Any]:
        """The settings that only the reader of this format takes."""
        return self.model_dump(exclude={*BenchSection.model_fields, "format"})


class VocBench(BenchSection):
    """PASCAL VOC's layout; `split` is a file of `ImageSets/Segmentation`."""

    format: Literal["voc"]
    metrics: Annotated[list[Literal["semantic", "instance", "size"]], Field(min_length=1)] = [
        "semantic",
        "instance",
    ]


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


class AuditParams(Section):
    """True masks of index images, in VOC's layout, used to score pseudo-masks and nothing else."""

    root: RelaxedPath
    categories: str | list[str]


class WorldParams(Section):
    """The demo's drawn world: numbers of images and side in pixels."""

    index_images: Count = 2000
    bench_images: Annotated[int, Field(ge=2)] = 300
    size: Annotated[int, Field(ge=32)] = 96


class Params(Section):
    """All of params.yaml.

    `background` names what is not asked for; label id 0 is the mean of their text embeddings.
    """

    k: Count = 500
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    categories: str | list[str]
    background: Annotated[list[Text], Field(min_length=1)] = ["background"]
    worlds: dict[EntryName, WorldParams] = {}
    index: Annotated[dict[EntryName, SourceParams], Field(min_length=1)]
    embed: EmbedParams = EmbedParams()
    retrieve: RetrieveParams = RetrieveParams()
    mask: MaskParams = MaskParams()
    pseudo_label: PseudoLabelParams = PseudoLabelParams()
    train: TrainParams = TrainParams()
    evaluate: EvaluateParams = EvaluateParams()
    benches: dict[EntryName, BenchParams] = {}
    audits: dict[EntryName, AuditParams] = {}


def read_params(path: Path) -> Params:
    """Read and check a params file (YAML 1.2, as DVC reads it).

    Raises:
        PipelineError: no such file, not YAML, or a key that is unknown, missing or has a value of
            the wrong type or range; every offending key is named.
    """
    try:
        content = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(
            f"{path}: no such file; `pipeline init --preset folder` writes one"
        ) from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise PipelineError(f"{path}: not valid YAML: {where}{error.problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not valid YAML: {error}") from None
    return parse_params(content, name=str(path))


def parse_params(content: Any, *, name: str = "params.yaml") -> Params:
    """Check the parsed content of a params file; `name` heads the error messages."""
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise PipelineError(f"{name}: expected `key: value` lines, found {found}")
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise PipelineError("\n".join(_complaints(name, error))) from None


class _BenchTable(Section):
    benches: dict[EntryName, BenchParams]


def parse_bench(content: Any, bench_name: str, *, name: str) -> BenchParams:
    """Check an entry of `benches` that stands in a file of its own; `name` is the file's."""
    try:
        return _BenchTable.model_validate({"benches": {bench_name: content}}).benches[bench_name]
    except ValidationError as error:
        raise PipelineError("\n".join(_complaints(name, error))) from None


def _complaints(name: str, error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        if item["loc"][-1] == "str" and isinstance(item["input"], list):
            continue  # a list of names is judged as a list
        location = [part for part in item["loc"] if not _is_union_branch(part)]
        if location[0] == "benches" and len(location) > 2 and location[2] in FORMATS:
            del location[2]  # the format chose the section
        key = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            yield f"{name}: unknown key {key!r}{_suggestion(item['loc'])}"
        elif item["type"] == "missing":
            yield f"{name}: key {key!r} is missing"
        elif item["type"] == "union_tag_not_found":
            yield f"{name}: key '{key}.format' is missing; expected one of {', '.join(FORMATS)}"
        elif item["type"] == "union_tag_invalid":
            yield (
                f"{name}: {key}.format: expected one of {', '.join(FORMATS)}, "
                f"got {item['input']['format']!r}"
            )
        elif location[-1] == "[key]":
            yield (
                f"{name}: {'.'.join(map(str, location[:-2]))}: {item['input']!r} is no name for an "
                "entry; use letters, digits and _, after the first one also - and ."
            )
        elif item["type"] == "string_pattern_mismatch":
            yield f"{name}: {key}: the name is empty; write one or remove it"
        elif item["type"] in ("model_type", "model_attributes_type"):
            yield f"{name}: {key}: expected `key: value` lines, got {item['input']!r}"
        else:
            problem = item["msg"].removeprefix("Value error, ")
            yield f"{name}: {key}: {problem}, got {item['input']!r}"


def _is_union_branch(part: str | int) -> bool:
    return part in ("str", "list[str]")


def _suggestion(location: tuple[str | int, ...]) -> str:
    """Name the closest known key of the section that holds the unknown one."""
    section: Any = Params
    for part in location[:-1]:
        if section is BenchParams:
            section = FORMATS[str(part)]
        elif get_origin(section) is dict:
            _, section = get_args(section)
        else:
            section = section.model_fields[part].annotation
            if isinstance(section, UnionType):  # a section or null
                section, _ = get_args(section)
    known = sorted(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
