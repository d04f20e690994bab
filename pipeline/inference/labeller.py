"""A dense labeller as a segmenter: the training-free baseline beside a network, or alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.engine.runtime import Runtime
from pipeline.files import digest
from pipeline.formats.labels import LabelMap, label_map
from pipeline.inference.confidence import confidence_map, find_name
from pipeline.inference.inputs import to_tensor
from pipeline.methods.dense import DenseLabeller, PseudoLabelParams, load_dense_labeller
from pipeline.models.layers.interpolate import upsampled_labels
from pipeline.params.base import PredictionSettings
from pipeline.vocabulary.categories import Names, unasked_names


class Labeller:
    """A dense labeller alone as a segmenter: label maps, no objects.

    Args:
        model: loaded with the names.
        names: what it tells apart.
        params: section `pseudo_label` of params.yaml.
        settings: size of the input, and whether a pixel may be background.
        runtime: device and precision.
    """

    def __init__(
        self,
        model: DenseLabeller,
        names: Names,
        *,
        params: PseudoLabelParams,
        settings: PredictionSettings,
        runtime: Runtime,
    ) -> None:
        self.names = names
        self.params = params
        self._all = model
        self._settings = settings
        self._runtime = runtime
        self._first = 0 if settings.background else 1
        label_ids = range(self._first, 1 + len(names.categories))
        self._model = model.select(label_ids) if self._first else model

    @classmethod
    def load(
        cls,
        params: PseudoLabelParams,
        *,
        categories: Sequence[str],
        background: Sequence[str],
        settings: PredictionSettings,
        runtime: Runtime,
    ) -> Labeller:
        """Load the method of section `pseudo_label` and embed the names.

        As for a `Segmenter`, a name of the background that is asked for is none.

        Raises:
            PipelineError: an encoder that cannot be loaded, or a name that it does not know.
        """
        names = Names(list(categories), unasked_names(background, categories))
        model = load_dense_labeller(params, names, runtime)
        return cls(model, names, params=params, settings=settings, runtime=runtime)

    @property
    def fingerprint(self) -> str:
        """Of all that its labels depend on besides image and names, weights included."""
        return digest(self._all.settings)

    @torch.no_grad()
    def confidence(self, image: Image.Image, name: str) -> NDArray[np.float32]:
        """Probability (H, W) of a name at each pixel of an RGB image.

        Raises:
            PipelineError: it is not among the names.
        """
        number = find_name(name, self.names.categories) + 1 - self._first
        pixels = to_tensor(image, self._settings, patch_size=self._model.patch_size)
        with self._runtime.autocast():
            scores = self._model.scores(pixels[None].to(self._runtime.device))
        through = [pixels.shape[1:]] if self._settings.upsampling == "published" else []
        size = image.height, image.width
        return confidence_map(scores, number, *through, size, scale=self._model.logit_scale)

    def select(self, categories: Sequence[str]) -> Labeller:
        """A labeller for some of the categories, which shares the networks.

        Raises:
            ValueError: one of them is not among the names.
        """
        known = list(self.names.categories)
        return Labeller(
            self._all.select([0, *(1 + known.index(name) for name in categories)]),
            Names(list(categories), self.names.background),
            params=self.params,
            settings=self._settings,
            runtime=self._runtime,
        )

    @torch.no_grad()
    def labels(self, image: Image.Image) -> LabelMap:
        """Label ids (H, W) of an RGB image, 0 is background."""
        pixels = to_tensor(image, self._settings, patch_size=self._model.patch_size)
        with self._runtime.autocast():
            scores = self._model.scores(pixels[None].to(self._runtime.device)).float()
        through = [pixels.shape[1:]] if self._settings.upsampling == "published" else []
        labels = upsampled_labels(scores, *through, (image.height, image.width))
        return label_map(labels[0].cpu().numpy(), self._first)
