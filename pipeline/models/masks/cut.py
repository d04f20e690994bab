"""Normalised cuts of an encoder's features as a mask source.

Letters: B images, N objects, H W pixels, h w feature grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.masks.features import FeatureEncoder
from pipeline.models.masks.normalised_cut import MAX_POSITIONS, cut_batch, cut_settings

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.masks import CutParams


class CutSource:
    """Normalised cuts as a mask source, see `pipeline.methods.masks.MaskSource`."""

    def __init__(self, params: CutParams, runtime: Runtime) -> None:
        self._encoder = FeatureEncoder(params, runtime)
        self._params = params
        self._seed = runtime.seed
        self.threshold = 0.5
        self.max_pixels = MAX_POSITIONS * self._encoder.patch_size**2
        self.settings = {
            "source": params.source,
            **self._encoder.settings,
            **cut_settings(params, runtime.seed),
        }

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> masks (B, H, W) in [0, 1] of the first object."""
        return self._cut(images, count=1)[:, 0]

    def predict_objects(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> masks (B, N, H, W), empty if there are fewer."""
        return self._cut(images, count=self._params.objects)

    def _cut(self, images: Tensor, count: int) -> Tensor:
        features = self._encoder(images)
        taken = torch.zeros(len(features), *features.shape[2:], dtype=torch.bool)
        return cut_batch(
            features,
            taken,
            count=count,
            size=(images.shape[-2], images.shape[-1]),
            patch=self._encoder.patch_size,
            params=self._params,
            seed=self._seed,
        )
