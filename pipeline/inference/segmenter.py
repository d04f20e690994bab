"""From an image to label map and objects, with any category names.

segmenter = Segmenter.load("models/zutis", categories=["cat", "dog"])
prediction = segmenter("photo.jpg")
prediction.semantic                       # (H, W) label ids, 0 is background
[segmenter.categories[i.label_id - 1] for i in prediction.instances]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.engine.runtime import Runtime, make_runtime
from pipeline.formats.predictions import Segmentation
from pipeline.inference.by_size import predict_by_size
from pipeline.inference.confidence import confidence_map, find_name
from pipeline.inference.inputs import ImageInput, to_rgb, to_tensor
from pipeline.inference.kept import others_beside
from pipeline.inference.prediction import Prediction
from pipeline.methods.students import TrainedStudent, trained_student
from pipeline.models.weights.checkpoint import read_checkpoint_config
from pipeline.models.weights.zoo import resolve_weights
from pipeline.params.base import PredictionSettings
from pipeline.vocabulary.categories import Names, load_category_set, texts_for, unasked_names


class Segmenter:
    """A trained student with some categories.

    Args:
        student: the network, loaded with the categories.
        categories: K names.
        settings: see `PredictionSettings`.
        num_others: how many names beyond those the network knows besides, see `others_beside`.
    """

    def __init__(
        self,
        student: TrainedStudent,
        *,
        categories: Sequence[str],
        settings: PredictionSettings,
        num_others: int = 0,
    ) -> None:
        self._num_others = num_others
        self.student = student
        self.categories = list(categories)
        self.settings = settings

    @classmethod
    def load(
        cls,
        checkpoint_dir: Path | str,
        *,
        categories: Sequence[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        settings: PredictionSettings | None = None,
        runtime: Runtime | None = None,
    ) -> Segmenter:
        """Load a checkpoint that `pipeline train` wrote, or a published one.

        Args:
            checkpoint_dir: folder with `model.safetensors` and `config.json`, or a name of
                `pipeline weights list` (kind zutis).
            categories: any names; None for those the checkpoint was trained with, which keep the
                `texts` that they were trained by. A name that was background in training is not
                any more.
            device: auto, cpu, cuda or mps.
            precision: see `make_runtime`.
            settings: see `PredictionSettings`.
            runtime: takes the place of `device` and `precision`.

        Raises:
            PipelineError: no checkpoint, one of another architecture, or a name that is empty,
                repeated or unknown to the text encoder.
        """
        runtime = runtime or make_runtime(device=device, precision=precision)
        folder = resolve_weights(checkpoint_dir, runtime.cache_dir)
        config = read_checkpoint_config(folder)
        categories = load_category_set(
            config.categories if categories is None else list(categories)
        )
        settings = settings or PredictionSettings()
        others = others_beside(categories, settings)
        asked = [*categories, *others]
        names = Names(
            asked, unasked_names(config.background, asked), texts_for(categories, config.texts)
        )
        return cls(
            trained_student(folder, config, names, runtime),
            categories=categories,
            settings=settings,
            num_others=len(others),
        )

    def select(self, categories: Sequence[str]) -> Segmenter:
        """A segmenter for some of the categories, which shares the network.

        Raises:
            ValueError: one of them is not among `categories`.
        """
        known = len(self.categories)
        chosen = [1 + self.categories.index(name) for name in categories]
        others = range(1 + known, 1 + known + self._num_others)
        return Segmenter(
            self.student.select([0, *chosen, *others]),
            categories=categories,
            settings=self.settings,
            num_others=self._num_others,
        )

    def __call__(self, image: ImageInput) -> Prediction:
        """Segment one image: a path, a PIL image, or (H, W, 3) uint8 RGB.

        Raises:
            ImageError: the file cannot be read; the message has its path and the reason.
        """
        return self.predict([image])[0]

    def predict(self, images: Sequence[ImageInput]) -> list[Prediction]:
        """Segment several images; those whose inputs are of one size share a forward pass."""
        return predict_by_size(
            images,
            to_input=self._input,
            segment=self._segment,
            categories=self.categories,
            settings=self.settings,
        )

    @torch.no_grad()
    def confidence(self, image: ImageInput, name: str) -> NDArray[np.float32]:
        """Probability (H, W) in [0, 1] of a name at each pixel of an image.

        Raises:
            ImageError: as a call.
            PipelineError: it is not among `categories`.
        """
        first = 0 if self.settings.background else 1
        number = find_name(name, self.categories) + 1 - first
        picture = to_rgb(image)
        pixels = self._input(picture)
        scores = self.student.scores(pixels[None])[:, first:]
        through = self.settings.through(pixels.shape[1:])
        return confidence_map(
            scores, number, picture, scale=self.student.logit_scale, through=through
        )

    def _input(self, picture: Image.Image) -> Tensor:
        """(3, H', W') in [0, 1]."""
        return to_tensor(picture, self.settings, patch_size=self.student.patch_size)

    def _segment(
        self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Segmentation]:
        """All that is found in images of these (H, W), whose inputs are of one size."""
        return self.student.predict(torch.stack(list(inputs)), sizes, self.settings)
