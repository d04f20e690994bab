"""From an image to label map and objects, with any category names.

segmenter = Segmenter.load("models/zutis", categories=["cat", "dog"])
prediction = segmenter("photo.jpg")
prediction.semantic                       # (H, W) label ids, 0 is background
[segmenter.categories[i.label_id - 1] for i in prediction.instances]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.categories import load_category_set
from pipeline.data.images import load_image
from pipeline.data.labels import LabelMap, label_map
from pipeline.data.prompts import TEMPLATE_SETS
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.models.build import CONFIG_NAME, WEIGHTS_NAME, build_zutis
from pipeline.models.clip import label_embeddings, load_clip
from pipeline.models.postprocess import (
    Instance,
    ScoreResolution,
    Suppression,
    instance_predictions,
    semantic_prediction,
)
from pipeline.models.tokens import vision_tower
from pipeline.models.weights import load_state, load_strict
from pipeline.models.zoo import resolve_weights
from pipeline.models.zutis import Zutis
from pipeline.runtime import Runtime, make_runtime

ROUNDING = 1e-6

ImageInput = Image.Image | Path | str | NDArray[np.uint8]


@dataclass(frozen=True)
class CheckpointConfig:
    """What `config.json` of a checkpoint says.

    Attributes:
        architecture: keyword arguments of `build_zutis`.
        encoder_model: see `load_clip`; so is `encoder_pretrained`.
        categories: names it was trained with, in the order of the label ids from 1.
        background: names whose mean embedding is label id 0.
        templates: name of the prompt templates of its text embeddings.
        step: training steps made.
    """

    architecture: Mapping[str, Any]
    encoder_model: str
    encoder_pretrained: str
    categories: list[str]
    background: list[str]
    templates: str
    step: int


@dataclass(frozen=True)
class PredictionSettings:
    """How the network's output becomes a prediction; defaults of the ZUTIS paper.

    Attributes:
        threshold: probability above which a pixel belongs to an object.
        temperature: factor of the cosine in an object's category score.
        suppression: non-maximum suppression among the objects of a category.
        score_resolution: see `instance_predictions`.
        resize_to: short side of the network's input in pixels; None keeps the image's.
        max_side: bound on its long side; None for no bound.
        whole_patches: see `input_size`.
        background: whether a pixel may be background; if not, the best category has it.
        instances: whether to look for objects; without, a prediction has none.
    """

    threshold: float = 0.5
    temperature: float = 5.0
    suppression: Suppression = "hard"
    score_resolution: ScoreResolution = "token"
    resize_to: int | None = None
    max_side: int | None = None
    whole_patches: bool = False
    background: bool = True
    instances: bool = True


@dataclass(frozen=True)
class Prediction:
    """The segmentation of one image, at its own size.

    Attributes:
        semantic: (H, W) int16 label ids, 0 is background.
        instances: objects by falling score.
        categories: names in the order of the label ids from 1.
    """

    semantic: LabelMap
    instances: list[Instance]
    categories: list[str] = field(repr=False)


class Segmenter:
    """A ZUTIS network with the text embeddings of some categories."""

    def __init__(
        self,
        network: Zutis,
        text_embeddings: Tensor,
        *,
        categories: Sequence[str],
        runtime: Runtime,
        settings: PredictionSettings,
    ) -> None:
        """Put the parts together; `Segmenter.load` makes them.

        Args:
            network: on the device of `runtime`.
            text_embeddings: (1 + K, C) unit rows by label id, the background's first.
            categories: K names.
            runtime: device and precision.
            settings: see `PredictionSettings`.
        """
        self.categories = list(categories)
        self.settings = settings
        self.patch_size = vision_tower(network.encoder).conv1.weight.shape[-1]
        self._network = network.eval()
        self._text = text_embeddings.to(runtime.device)
        self._runtime = runtime

    @classmethod
    def load(
        cls,
        checkpoint_dir: Path | str,
        *,
        categories: Sequence[str] | None = None,
        device: str = "auto",
        settings: PredictionSettings | None = None,
        runtime: Runtime | None = None,
    ) -> Segmenter:
        """Load a checkpoint that `pipeline train` wrote, or a published one.

        Args:
            checkpoint_dir: folder with `model.safetensors` and `config.json`, or a name of
                `pipeline weights list` (kind zutis).
            categories: any names; None for those the checkpoint was trained with. A name that was
                background in training is not any more.
            device: auto, cpu or cuda.
            settings: see `PredictionSettings`.
            runtime: takes the place of `device`.

        Raises:
            PipelineError: no checkpoint, one of another architecture, or a name that is empty,
                repeated or unknown to the text encoder.
        """
        runtime = runtime or make_runtime(device=device)
        folder = resolve_weights(checkpoint_dir, runtime.cache_dir)
        config = read_checkpoint_config(folder)
        names = load_category_set(config.categories if categories is None else list(categories))
        clip = load_clip(
            config.encoder_model,
            config.encoder_pretrained,
            runtime.device,
            cache_dir=runtime.cache_dir,
        )
        text = label_embeddings(
            clip,
            background=unasked_names(config.background, names),
            categories=names,
            templates=TEMPLATE_SETS[config.templates],
        )
        try:
            network = build_zutis(clip.visual, **config.architecture)
        except (TypeError, PipelineError) as error:
            reason = str(error).split("\n")[0]
            raise PipelineError(f"{folder / CONFIG_NAME}: architecture: {reason}") from None
        load_strict(network, load_state(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
        return cls(
            network.to(runtime.device),
            text,
            categories=names,
            runtime=runtime,
            settings=settings or PredictionSettings(),
        )

    def select(self, categories: Sequence[str]) -> Segmenter:
        """A segmenter for some of the categories, which shares the network.

        Raises:
            ValueError: one of them is not among `categories`.
        """
        rows = [0, *(1 + self.categories.index(name) for name in categories)]
        return Segmenter(
            self._network,
            self._text[rows],
            categories=categories,
            runtime=self._runtime,
            settings=self.settings,
        )

    def __call__(self, image: ImageInput) -> Prediction:
        """Segment one image: a path, a PIL image, or (H, W, 3) uint8 RGB.

        Raises:
            ImageError: the file cannot be read; the message is the reason.
        """
        return self.predict([image])[0]

    def predict(self, images: Sequence[ImageInput]) -> list[Prediction]:
        """Segment several images; those whose inputs are of one size share a forward pass."""
        pictures = [to_rgb(image) for image in images]
        inputs = [
            to_tensor(picture, self.settings, patch_size=self.patch_size) for picture in pictures
        ]
        groups: dict[torch.Size, list[int]] = {}
        for index, tensor in enumerate(inputs):
            groups.setdefault(tensor.shape, []).append(index)
        predictions: dict[int, Prediction] = {}
        for members in groups.values():
            sizes = [(pictures[index].height, pictures[index].width) for index in members]
            batch = torch.stack([inputs[index] for index in members])
            predictions.update(zip(members, self._segment(batch, sizes), strict=True))
        return [predictions[index] for index in range(len(pictures))]

    @torch.no_grad()
    def _segment(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Predictions at `sizes` (H, W) of network inputs (B, 3, H', W') in [0, 1]."""
        with self._runtime.autocast():
            output = self._network(images.to(self._runtime.device))
        mask_probs = output.mask_logits[:, -1].float().sigmoid()
        patch_tokens = output.patch_tokens.float()
        predictions = []
        for probs, tokens, size in zip(mask_probs, patch_tokens, sizes, strict=True):
            labels = self._label_map(tokens, size)
            instances = self._instances(probs, tokens, size) if self.settings.instances else []
            predictions.append(Prediction(labels, instances, self.categories))
        return predictions

    def _label_map(self, patch_tokens: Tensor, size: tuple[int, int]) -> LabelMap:
        first = 0 if self.settings.background else 1
        semantic = semantic_prediction(patch_tokens[None], self._text[first:], size)[0]
        return label_map(semantic.cpu().numpy(), first)

    def _instances(
        self, mask_probs: Tensor, patch_tokens: Tensor, size: tuple[int, int]
    ) -> list[Instance]:
        return instance_predictions(
            mask_probs,
            patch_tokens,
            self._text,
            size,
            threshold=self.settings.threshold,
            temperature=self.settings.temperature,
            suppression=self.settings.suppression,
            score_resolution=self.settings.score_resolution,
        )


def unasked_names(background: Sequence[str], categories: Sequence[str]) -> list[str]:
    """The background's names without those that are asked for; all, if none were left."""
    asked = {name.casefold() for name in categories}
    return [name for name in background if name.casefold() not in asked] or list(background)


def read_checkpoint_config(checkpoint_dir: Path) -> CheckpointConfig:
    """Read `config.json` of a checkpoint.

    Raises:
        PipelineError: missing, or an entry is missing or of the wrong type; the message names it.
    """
    path = Path(checkpoint_dir) / CONFIG_NAME
    if not path.is_file():
        raise PipelineError(
            f"{path}: no such file; `pipeline train` writes a checkpoint, and "
            "`pipeline weights list` names published ones"
        )
    content = read_json(path)
    try:
        encoder = content["encoder"]
        config = CheckpointConfig(
            architecture=dict(content["architecture"]),
            encoder_model=str(encoder["model"]),
            encoder_pretrained=str(encoder["pretrained"]),
            categories=_names(content["categories"]),
            background=_names(content["background"]),
            templates=str(content["templates"]),
            step=int(content["step"]),
        )
    except KeyError as error:
        raise PipelineError(f"{path}: entry {error.args[0]!r} is missing; train again") from None
    except (TypeError, ValueError) as error:
        raise PipelineError(f"{path}: not the settings of a checkpoint ({error})") from None
    if config.templates not in TEMPLATE_SETS:
        raise PipelineError(
            f"{path}: templates {config.templates!r}: expected one of {', '.join(TEMPLATE_SETS)}"
        )
    return config


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"expected a list of names, found {value!r}")
    return value


def input_size(
    width: int, height: int, settings: PredictionSettings, *, patch_size: int
) -> tuple[int, int]:
    """(width, height) of the network's input for an image.

    Where nothing asks for another size the image keeps its own; a resized one keeps its aspect, the
    other side rounded down. The network then ignores what exceeds whole patches at the right and
    bottom and its prediction is stretched over it: as in the published code; the paper says
    "original resolution" (4.1). Under `whole_patches` sides are multiples of the patch size
    instead, so that no pixel is cut off. No side is shorter than a patch.
    """
    scale = 1.0 if settings.resize_to is None else settings.resize_to / min(width, height)
    if settings.max_side is not None:
        scale = min(scale, settings.max_side / max(width, height))
    step = patch_size if settings.whole_patches else 1
    to_steps = round if settings.whole_patches else _floor
    new_width, new_height = (
        max(patch_size, step * to_steps(side * scale / step)) for side in (width, height)
    )
    return new_width, new_height


def _floor(value: float) -> int:
    """Largest integer below `value`, or above it by no more than rounding makes of an integer."""
    return math.floor(value + ROUNDING)


def to_tensor(image: Image.Image, settings: PredictionSettings, *, patch_size: int) -> Tensor:
    """Network input (3, H', W') float32 in [0, 1] of an RGB image."""
    size = input_size(image.width, image.height, settings, patch_size=patch_size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_rgb(image: ImageInput) -> Image.Image:
    """RGB image of a path, a PIL image of any mode, or an (H, W, 3) uint8 array.

    Raises:
        ImageError: the file cannot be read.
        ValueError: an array of another shape or type.
    """
    if isinstance(image, str | Path):
        return load_image(Path(image))
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"{image.dtype} array {image.shape}: expected uint8 (H, W, 3)")
    return Image.fromarray(image)
