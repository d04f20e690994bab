"""From an image to label map and objects, with any category names.

segmenter = Segmenter.load("models/zutis", categories=["cat", "dog"])
prediction = segmenter("photo.jpg")
prediction.semantic                       # (H, W) label ids, 0 is background
[segmenter.categories[i.label_id - 1] for i in prediction.instances]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.engine.runtime import Runtime, make_runtime
from pipeline.errors import PipelineError
from pipeline.formats.labels import LabelMap, label_map
from pipeline.inference.checkpoint import read_checkpoint_config
from pipeline.methods.inputs import ImageInput, PredictionSettings, to_rgb, to_tensor
from pipeline.models.clip import label_embeddings, load_clip
from pipeline.models.clip.tokens import vision_tower
from pipeline.models.weights.weights import load_state, load_strict
from pipeline.models.weights.zoo import resolve_weights
from pipeline.models.zutis.build import CONFIG_NAME, WEIGHTS_NAME, build_zutis
from pipeline.models.zutis.network import Zutis
from pipeline.models.zutis.postprocess import Instance, instance_predictions, semantic_prediction
from pipeline.vocabulary.categories import load_category_set, unasked_names
from pipeline.vocabulary.prompts import TEMPLATE_SETS


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
