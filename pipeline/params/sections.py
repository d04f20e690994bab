"""The typed content of params.yaml: one frozen section per stage, and its only reader.

Defaults are the papers' settings. An unknown key, a value of the wrong type or out of its range is
a `PipelineError` that names the key.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pipeline.methods.dense import DenseClipParams, PseudoLabelParams
from pipeline.methods.masks import MASK_SOURCES, MaskParams, SelfMaskParams
from pipeline.methods.students import DenseClipPlusParams, StudentParams, ZutisParams
from pipeline.params.base import (
    IF_SET,
    CategoryParams,
    Count,
    EncoderParams,
    EntryName,
    NumWorkers,
    PredictionParams,
    Probability,
    RelaxedPath,
    Section,
    Seed,
    Templates,
    Text,
)
from pipeline.params.benches import BenchParams
from pipeline.params.sources import SourceParams


class EmbedParams(Section):
    """Stage 1: image embeddings of the index dataset.

    The stage fails if more than `max_error_rate` of the images, and more than one, cannot be read.
    """

    encoder: EncoderParams = EncoderParams(model="ViT-L-14-336-quickgelu")
    batch_size: Count = 64
    shard_size: Count = 10_000
    workers: NumWorkers = 2
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

    Two filters, off by null, make lists purer (docs/archives.md); the next best images take the
    places of those left out. `min_margin` is how much more similar to its category than to any
    other name, the background's included, an image is at least. `min_distance` is the cosine
    distance of an image's embedding from those of all better ones of its list, at least.
    """

    templates: Templates = "prompts85"
    overlap: Literal["best", "all", "last"] = "last"
    num_negatives: Annotated[int, Field(ge=0)] = 0
    search: Literal["exact", "ivf"] = "exact"
    probes: Count = 64
    block_rows: Count = 16_384
    min_margin: Annotated[float, Field(ge=-2.0, le=2.0)] | None = IF_SET
    min_distance: Annotated[float, Field(ge=0.0, le=2.0)] | None = IF_SET


class BankParams(Section):
    """A bank of regions of one's own images, and its use in `pseudo_label`.

    Its regions are the parts of every pseudo-mask and of what the mask leaves, from the archives
    and from `sample` more images of the index. They are compared by the features of `encoder`
    (null: that of `pseudo_label`), see `SpectralParams` for it and `facet`. A region of less than
    `min_share` of its image is none; an image without a mask is cut into spectral `clusters`.
    Labels are (1 - `weight`) own and `weight` those of the `nearest` regions of other images.
    """

    encoder: EncoderParams | None = None
    facet: Literal["key", "token"] = "key"
    sample: Annotated[int, Field(ge=0)] = 1000
    clusters: Count = 4
    min_share: Probability = 0.001
    nearest: Count = 20
    weight: Probability = 0.5
    batch_size: Count = 16
    workers: NumWorkers = 2
    shard_size: Count = 500


class EvaluateParams(PredictionParams):
    """Stage 6: prediction and scores on the benchmarks, with `overlays` pictures of each."""

    batch_size: Count = 1
    overlays: Annotated[int, Field(ge=0)] = 24
    max_error_rate: Probability = 0.01


class AuditParams(Section):
    """True masks of index images, in VOC's layout, used to score pseudo-masks and nothing else."""

    root: RelaxedPath
    categories: str | list[str]


class WorldParams(Section):
    """The demo's drawn world: images of the index and of each of two benchmarks, side in pixels."""

    index_images: Count = 2000
    bench_images: Annotated[int, Field(ge=2)] = 300
    size: Annotated[int, Field(ge=32)] = 96


class PlusParams(Section):
    """A DenseCLIP+ beside the network of `train`: how it is trained, and what scores it.

    `bench` scores the teacher too, and the network at its switch to self-training.
    """

    train: DenseClipPlusParams
    bench: BenchParams


class RoundParams(Section):
    """One more round: a trained student labels the archives anew, and one is trained on that.

    `after` is the folder of the checkpoint that labels: that of `train`, or of the round before.
    Its objects are kept whose score passes `score_threshold`; see `pipeline.training.relabelling`.
    A share `held_out` of the images is trained on by no round, but compared: the new checkpoint
    counts if its label maps agree with the pseudo-labels there no less than the former's, and the
    shares of the categories in them have moved by at most `drift_tolerance` (half the sum of
    differences). Otherwise the former stays.
    """

    after: RelaxedPath
    score_threshold: Probability = 0.5
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    drift_tolerance: Probability = 0.3
    batch_size: Count = 8
    shard_size: Count = 250


class Params(Section):
    """All of params.yaml.

    `categories` is a shipped set's name or a list, in the order of the label ids, of names and of
    `{name: NAME, texts: [WORDS, ...]}`.
    `background` names what is not asked for; label id 0 is the mean of their text embeddings.
    `device` `auto` is a CUDA device where there is one, else the CPU; `mps`, the GPU of a Mac, has
    to be asked for.
    `precision` is that of the networks: `auto` is bfloat16 on CUDA and float32 elsewhere; training
    takes no float16.
    `threads` are those of the networks on the CPU: `auto` is one a core, or $OMP_NUM_THREADS. They
    decide the time and perhaps the last bits of a sum, so DVC does not track them.
    """

    k: Count = 500
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    categories: str | list[str | CategoryParams]
    background: Annotated[list[Text], Field(min_length=1)] = ["background"]
    worlds: dict[EntryName, WorldParams] = {}
    index: Annotated[dict[EntryName, SourceParams], Field(min_length=1)]
    embed: EmbedParams = EmbedParams()
    retrieve: RetrieveParams = RetrieveParams()
    mask: SerializeAsAny[MaskParams] = SelfMaskParams()
    bank: BankParams | None = None
    pseudo_label: SerializeAsAny[PseudoLabelParams] = DenseClipParams()
    train: SerializeAsAny[StudentParams] = ZutisParams()
    rounds: dict[EntryName, RoundParams] = {}
    plus: dict[EntryName, PlusParams] = {}
    evaluate: EvaluateParams = EvaluateParams()
    benches: dict[EntryName, BenchParams] = {}
    audits: dict[EntryName, AuditParams] = {}

    @property
    def category_names(self) -> str | list[str]:
        """The shipped set's name, or the names of the list."""
        if isinstance(self.categories, str):
            return self.categories
        return [entry if isinstance(entry, str) else entry.name for entry in self.categories]

    @property
    def texts(self) -> dict[str, list[str]]:
        """What stands for a category in prompts, of those that have other words than their name."""
        entries = [] if isinstance(self.categories, str) else self.categories
        return {entry.name.strip(): entry.texts for entry in entries if not isinstance(entry, str)}

    @field_validator("benches")
    @classmethod
    def _check_names(cls, benches: dict[str, BenchParams]) -> dict[str, BenchParams]:
        """Refuse the name of the metrics file of DenseCLIP+."""
        if "plus" in benches:
            raise ValueError("plus.json has the scores of DenseCLIP+; give `plus` another name")
        return benches

    @field_validator("rounds")
    @classmethod
    def _check_held_out(cls, rounds: dict[str, RoundParams]) -> dict[str, RoundParams]:
        """Refuse rounds that would be judged on what an earlier one was trained on."""
        shares = {name: entry.held_out for name, entry in rounds.items()}
        if len(set(shares.values())) > 1:
            listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            raise ValueError(f"held_out: the same images must be held out of all rounds: {listed}")
        return rounds

    @model_validator(mode="after")
    def _check_bank_masks(self) -> Self:
        """Refuse a sample of the bank for masks of a source that learns from archives first."""
        if self.bank and self.bank.sample and MASK_SOURCES[self.mask.source].learner:
            raise ValueError(
                f"bank.sample: {self.bank.sample}: mask.source: {self.mask.source} learns from the "
                "archives, which the bank does not see; set bank.sample to 0 or take another source"
            )
        return self
