"""Dense labellers: what labels every pixel of an image by names, training-free.

A new one is a file in `pipeline/models/dense/` with its network, and here its params and an entry
in `DENSE_LABELLERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self, cast

from pydantic import Field, model_validator

from pipeline.errors import PipelineError, did_you_mean, listing
from pipeline.params.base import (
    Count,
    EncoderParams,
    NumWorkers,
    PamrParams,
    Positive,
    Probability,
    RelaxedPath,
    Section,
    Templates,
    Text,
)
from pipeline.vocabulary.categories import Names, plain_name, texts_for

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

    def features(self, images: Tensor) -> Tensor:
        """Features (B, C, h, w) of patches, float32, of any length, beside `text`."""

    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `scores` and `features` give, in one pass."""


class TextLabeller(ObjectLabeller, Protocol):
    """One that can be given other text, as `template_choice` asks for.

    The score of a row depends on no other row.

    Attributes:
        gives_pixels: whether its scores are of pixels, not of patches.
    """

    gives_pixels: bool

    def with_text(self, text: Tensor) -> Self:
        """The same with other unit rows (R, C) in place of the label ids'."""

    def embed(self, names: Names, templates: Sequence[str]) -> Tensor:
        """Unit rows (1 + K, C) by label id of names in some templates, means over these."""


class WindowParams(Section):
    """Windows of `side` pixels, one every `stride`; the last ones end with the image."""

    side: Count
    stride: Count

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride > self.side:
            raise ValueError(
                f"stride: {self.stride} leaves gaps between windows of side: {self.side}; "
                "take at most the side, such as half of it"
            )
        return self


class TemplateChoiceParams(Section):
    """The `keep` templates of each name that are most certain on unlabelled images.

    `num_images` images are taken, evenly spaced, from `images`: the folder of mask shards, whose
    images are those of the archives, or one of image files.
    """

    images: RelaxedPath = Path("data/masks")
    num_images: Count = 100
    keep: Count = 4


class PseudoLabelParams(Section):
    """Stage 4: dense labels, training-free, by the method that `method` names.

    Options of every method, off by default (docs/dense_labels.md): an image is seen in `windows`,
    scores are refined by colour (`pamr`), each name has templates of its own (`template_choice`) or
    other names beside it (`synonyms`), each of the background's names stands for itself instead of
    for their `mean` (`background_names`: the best one counts), and a pixel whose best category has
    a probability below `background_threshold` is background.
    """

    method: str
    encoder: EncoderParams = EncoderParams()
    templates: Templates = "prompts85"
    batch_size: Count = 16
    workers: NumWorkers = 2
    shard_size: Count = 500
    windows: WindowParams | None = None
    pamr: PamrParams | None = None
    template_choice: TemplateChoiceParams | None = None
    synonyms: dict[Text, Annotated[list[Text], Field(min_length=1)]] = {}
    background_names: Literal["mean", "each"] = "mean"
    background_threshold: Probability | None = None

    @model_validator(mode="after")
    def _check_synonyms(self) -> Self:
        seen: set[str] = set()
        for name, others in self.synonyms.items():
            for written in (name, *others):
                if plain_name(written) in seen:
                    raise ValueError(f"synonyms.{name}: {written!r} is listed twice; remove one")
                seen.add(plain_name(written))
        return self

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        for name in ("prompt_denoising", "key_smoothing"):
            if self.template_choice is not None and getattr(self, name, None) is not None:
                raise ValueError(
                    f"{name}: it weighs names against each other before the experts of "
                    "template_choice do; set one of the two to null"
                )
        return self

    @model_validator(mode="after")
    def _check_denoising(self) -> Self:
        if self.windows is not None and getattr(self, "prompt_denoising", None) is not None:
            raise ValueError(
                "prompt_denoising: what it removes from one window would be lost in all that "
                "overlap it; set it or windows to null"
            )
        return self

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the labels, but for the encoder; options where they are on."""
        others = {"method", "encoder", "batch_size", "workers", "shard_size"}
        settings = self.model_dump(mode="json", exclude=others | OPTIONS)
        return {**settings, **self.options()}

    def options(self) -> dict[str, Any]:
        """The options that are on; so what is known of labels without them reads as before."""
        chosen = self.model_dump(mode="json", include=OPTIONS)
        return {name: value for name, value in chosen.items() if value not in (None, {}, "mean")}


OPTIONS = {
    "windows",
    "pamr",
    "template_choice",
    "synonyms",
    "background_names",
    "background_threshold",
    "stitch",
}


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


class DenseClipSection(DenseClipRecipe, PseudoLabelParams):
    """DenseCLIP with its encoder, or what is built on it.

    `stitch` puts windows together before the last block of CLIP's own ViT.
    """

    stitch: WindowParams | None = None


class DenseClipParams(DenseClipSection):
    """DenseCLIP alone, as a stage."""

    method: Literal["denseclip"] = "denseclip"
    stitch: WindowParams | None = None


class AttentionParams(PseudoLabelParams):
    """What labellers with another attention in the last block of CLIP's own ViT share.

    As in `DenseClipRecipe`, but without the slips of DenseCLIP's code unless they are asked for.
    """

    prompt_denoising: Probability | None = None
    published_activation: bool = False
    normalisation: Literal["imagenet", "clip"] = "clip"
    position_resize: Literal["size", "grid"] = "grid"
    logit_scale: Positive = 100.0
    stitch: WindowParams | None = None


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


class LpossSection(DenseClipSection):
    """DenseCLIP's scores, spread between patches of like values.

    A patch is joined to `neighbours` others by the values of the last block of `graph_encoder`, a
    CLIP or a DINO as for spectral masks; null takes `encoder`. Patches of all `windows` share a
    graph.
    """

    graph_encoder: EncoderParams | None = None
    neighbours: Count = 400


class LpossParams(LpossSection):
    """LPOSS."""

    method: Literal["lposs"] = "lposs"


class LpossPlusParams(LpossSection):
    """LPOSS+: spread once more between neighbouring pixels of like colour."""

    method: Literal["lposs_plus"] = "lposs_plus"


@dataclass(frozen=True)
class DenseMethod:
    """An entry of `DENSE_LABELLERS`.

    Attributes:
        params: the class of its params.
        load: loads it by these.
        gives_objects: whether what is loaded is an `ObjectLabeller`, whose regions are objects too.
        sees_windows: whether what is loaded sees to `windows` itself.
    """

    params: type[PseudoLabelParams]
    load: Callable[[Any, Names, Runtime], DenseLabeller]
    gives_objects: bool = False
    sees_windows: bool = False


def _denseclip(params: DenseClipParams, names: Names, runtime: Runtime) -> DenseLabeller:
    from pipeline.models.dense.denseclip import load_denseclip

    return load_denseclip(params, names, runtime)


def _attention(params: AttentionParams, names: Names, runtime: Runtime) -> DenseLabeller:
    from pipeline.models.dense.attentions import load_attention_labeller

    return load_attention_labeller(params, names, runtime)


def _proxyclip(params: ProxyClipParams, names: Names, runtime: Runtime) -> DenseLabeller:
    from pipeline.models.dense.proxyclip import load_proxyclip

    return load_proxyclip(params, names, runtime)


def _lposs(params: LpossSection, names: Names, runtime: Runtime) -> DenseLabeller:
    from pipeline.models.clip.patches import load_patch_encoder
    from pipeline.models.dense.denseclip import load_denseclip
    from pipeline.models.dense.lposs import Lposs, ValueEncoder

    labeller = load_denseclip(params, names, runtime)
    encoder: ValueEncoder = labeller.encoder
    if params.graph_encoder is not None:
        encoder = load_patch_encoder(
            params.graph_encoder, runtime, field="pseudo_label.graph_encoder"
        )
    return Lposs(labeller, encoder, params, with_pixels=isinstance(params, LpossPlusParams))


DENSE_LABELLERS = {
    "denseclip": DenseMethod(DenseClipParams, _denseclip, gives_objects=True),
    "sclip": DenseMethod(SclipParams, _attention, gives_objects=True),
    "clearclip": DenseMethod(ClearClipParams, _attention, gives_objects=True),
    "naclip": DenseMethod(NaClipParams, _attention, gives_objects=True),
    "proxyclip": DenseMethod(ProxyClipParams, _proxyclip, gives_objects=True),
    "scclip": DenseMethod(ScClipParams, _attention, gives_objects=True),
    "lposs": DenseMethod(LpossParams, _lposs, gives_objects=True, sees_windows=True),
    "lposs_plus": DenseMethod(LpossPlusParams, _lposs, gives_objects=True, sees_windows=True),
}


def load_dense_labeller(params: PseudoLabelParams, names: Names, runtime: Runtime) -> DenseLabeller:
    """The dense labeller that the params are of, with the options that are on.

    Each text of a category is a row of its own, and the best one counts, as of synonyms. Synonyms
    of what is no category, or is asked for by itself, are passed over.

    Raises:
        PipelineError: an encoder that cannot be loaded, a name that it does not know, or a method
            or images that `template_choice` cannot use.
    """
    entry = DENSE_LABELLERS[params.method]
    if not (params.options() or names.texts):
        return entry.load(params, names, runtime)
    from pipeline.models.dense.options import LabellerWithOptions

    asked, rows = _with_synonyms(names, params.synonyms)
    if params.background_names == "each":
        asked, rows = _with_each_background(asked, rows)
    labeller = entry.load(params, asked, runtime)
    if params.template_choice is not None:
        labeller = _with_experts(labeller, params, params.template_choice, asked, runtime)
    windows = None if entry.sees_windows else params.windows
    return LabellerWithOptions(labeller, params, rows, windows=windows, texts=names.texts)


def check_synonyms(params: PseudoLabelParams, names: Names) -> None:
    """Refuse synonyms that have no effect.

    Raises:
        PipelineError: they are of a name that is no category, or are names themselves.
    """
    categories = [plain_name(name) for name in names.categories]
    background = [plain_name(name) for name in names.background]
    for name, others in params.synonyms.items():
        field = f"pseudo_label.synonyms.{name}"
        if texts_for([name], names.texts):
            raise PipelineError(f"{field}: {name!r} has `texts` under categories; list them there")
        if plain_name(name) not in categories:
            raise PipelineError(
                f"{field}: {name!r} is not among the categories; "
                f"{did_you_mean(name, names.categories)}they are: {listing(names.categories)}"
            )
        for other in others:
            if plain_name(other) in categories + background:
                place = "a category" if plain_name(other) in categories else "the background"
                raise PipelineError(f"{field}: {other!r} is {place} by itself; remove one")


def _with_synonyms(
    names: Names, synonyms: Mapping[str, Sequence[str]]
) -> tuple[Names, list[list[int]]]:
    """First texts, further ones and synonyms, and which of these stand for each label id."""
    texts = [list(names.texts.get(name, [name])) for name in names.categories]
    taken = {plain_name(text) for text in (*chain.from_iterable(texts), *names.background)}
    known = {plain_name(name): others for name, others in synonyms.items()}
    categories = [first for first, *_ in texts]
    rows = [[number] for number in range(1 + len(categories))]
    for own, name, (_, *further) in zip(rows[1:], names.categories, texts, strict=True):
        others = known.get(plain_name(name), [])
        for text in (*further, *(other for other in others if plain_name(other) not in taken)):
            categories.append(text)
            own.append(len(categories))
    return Names(categories, names.background), rows


def _with_each_background(names: Names, rows: list[list[int]]) -> tuple[Names, list[list[int]]]:
    """The background's names as names of their own, all of which stand for label id 0."""
    first, *others = names.background
    start = 1 + len(names.categories)
    background = [0, *range(start, start + len(others))]
    return Names([*names.categories, *others], [first]), [background, *rows[1:]]


def _with_experts(
    labeller: DenseLabeller,
    params: PseudoLabelParams,
    choice: TemplateChoiceParams,
    names: Names,
    runtime: Runtime,
) -> DenseLabeller:
    import torch

    from pipeline.models.dense.sample import image_sample
    from pipeline.models.dense.templates import (
        TemplateExperts,
        choose_templates,
        expert_classifiers,
    )
    from pipeline.vocabulary.prompts import templates

    if not hasattr(labeller, "with_text"):
        raise PipelineError(
            f"pseudo_label.template_choice: method {params.method} takes no other text; set it to "
            "null"
        )
    teller = cast("TextLabeller", labeller)
    classifiers = torch.stack(
        [teller.embed(names, [template]) for template in templates(params.templates)]
    )
    images = image_sample(choice.images, choice.num_images)
    with runtime.autocast():
        chosen = choose_templates(
            teller, classifiers, (image.to(runtime.device) for image in images), keep=choice.keep
        )
    return TemplateExperts(teller, expert_classifiers(classifiers, chosen))
