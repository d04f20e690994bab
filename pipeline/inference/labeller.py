"""A dense labeller as a segmenter: the training-free baseline beside a network, or alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.engine.runtime import Runtime
from pipeline.files import digest
from pipeline.formats.predictions import Segmentation
from pipeline.inference.confidence import confidence_map, find_name
from pipeline.inference.inputs import to_tensor
from pipeline.inference.kept import kept, others_beside
from pipeline.methods.dense import (
    DENSE_LABELLERS,
    DenseLabeller,
    ObjectLabeller,
    PseudoLabelParams,
    load_dense_labeller,
)
from pipeline.models.dense.labels import label_and_confidence
from pipeline.models.dense.objects import objects_of_labels
from pipeline.models.layers.interpolate import upsampled_labels
from pipeline.models.layers.regions import labels_of_regions
from pipeline.params.base import PredictionSettings
from pipeline.vocabulary.categories import Names, texts_for, unasked_names


class Labeller:
    """A dense labeller alone as a segmenter: label maps, whose regions may be objects.

    Args:
        model: loaded with the names.
        names: what it tells apart.
        params: section `pseudo_label` of params.yaml.
        settings: size of the input, whether a pixel may be background, and whether objects are
            looked for, and how.
        runtime: device and precision.
        num_others: how many names beyond those `model` knows besides, see `others_beside`.

    Attributes:
        finds_objects: whether they are, and the method can.
    """

    def __init__(
        self,
        model: DenseLabeller,
        names: Names,
        *,
        params: PseudoLabelParams,
        settings: PredictionSettings,
        runtime: Runtime,
        num_others: int = 0,
    ) -> None:
        self.names = names
        self.params = params
        self._all = model
        self.settings = settings
        self.finds_objects = settings.instances and DENSE_LABELLERS[params.method].gives_objects
        self._runtime = runtime
        self._num_others = num_others
        self._first = 0 if settings.background else 1
        label_ids = range(self._first, 1 + len(names.categories) + num_others)
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
        texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> Labeller:
        """Load the method of section `pseudo_label` and embed the names.

        As for a `Segmenter`, a name of the background that is asked for is none. `texts` are those
        of `Names`.

        Raises:
            PipelineError: an encoder that cannot be loaded, or a name that it does not know.
        """
        others = others_beside(categories, settings)
        asked = [*categories, *others]
        names = Names(asked, unasked_names(background, asked), texts_for(categories, texts))
        return cls(
            load_dense_labeller(params, names, runtime),
            replace(names, categories=list(categories)),
            params=params,
            settings=settings,
            runtime=runtime,
            num_others=len(others),
        )

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
        pixels = to_tensor(image, self.settings, patch_size=self._model.patch_size)
        with self._runtime.autocast():
            scores = self._model.scores(pixels[None].to(self._runtime.device))
        through = self.settings.through(pixels.shape[1:])
        return confidence_map(scores, number, image, scale=self._model.logit_scale, through=through)

    def select(self, categories: Sequence[str]) -> Labeller:
        """A labeller for some of the categories, which shares the networks.

        Raises:
            ValueError: one of them is not among the names.
        """
        known = list(self.names.categories)
        others = range(1 + len(known), 1 + len(known) + self._num_others)
        return Labeller(
            self._all.select([0, *(1 + known.index(name) for name in categories), *others]),
            replace(self.names, categories=list(categories)),
            params=self.params,
            settings=self.settings,
            runtime=self._runtime,
            num_others=self._num_others,
        )

    @torch.no_grad()
    def predict(self, image: Image.Image) -> Segmentation:
        """Label map, and objects if any are looked for, of an RGB image."""
        return kept(self._predict(image), self.names.categories, self.settings)

    def _predict(self, image: Image.Image) -> Segmentation:
        """The same with the others, by label ids beyond those of the categories."""
        pixels = to_tensor(image, self.settings, patch_size=self._model.patch_size)
        size = image.height, image.width
        through = self.settings.through(pixels.shape[1:])
        batch = pixels[None].to(self._runtime.device)
        if not self.finds_objects:
            with self._runtime.autocast():
                scores = self._model.scores(batch).float()
            rows = upsampled_labels(scores, *through, size)
            return Segmentation(labels_of_regions(rows[0], self._first, self.settings), [])
        model = cast("ObjectLabeller", self._model)
        with self._runtime.autocast():
            scores, features = model.scores_and_features(batch)
        rows, confidence = label_and_confidence(
            scores.float(), size, scale=model.logit_scale, through=through
        )
        labels = labels_of_regions(rows[0], self._first, self.settings)
        objects = objects_of_labels(
            labels,
            confidence[0].cpu().numpy(),
            features[0].float(),
            cast("ObjectLabeller", self._all).text,
            regions=self.settings.labeller_objects,
            temperature=self.settings.temperature,
        )
        return Segmentation(labels, objects)
