"""The typed content of params.yaml: one frozen section per stage, and its only reader.

Defaults are the papers' settings. An unknown key, a value of the wrong type or out of its range is
a `PipelineError` that names the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline.params.base import (
    Count,
    EncoderParams,
    EntryName,
    Positive,
    Probability,
    RelaxedLocation,
    RelaxedPath,
    Section,
    Seed,
    Text,
    Workers,
)
from pipeline.params.benches import BenchParams


def _ascending(values: list[float]) -> list[float]:
    if values != sorted(values):
        raise ValueError("Input should be in ascending order")
    return values


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
