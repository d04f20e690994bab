"""One 1 x 1 convolution on frozen features that learns from votes: FOUND (Simeoni et al., 2023).

Votes cost an eigendecomposition an image, the convolution next to nothing. Letters: B images, N
objects, C channels, h w feature grid, n positions, H W pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load, save
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.models.masks.features import FeatureEncoder
from pipeline.models.masks.making import as_tensors, coarse_masks, refine_mask
from pipeline.models.masks.normalised_cut import further_settings, with_further_objects
from pipeline.models.masks.spectral import SpectralSource
from pipeline.models.masks.threads import single_threaded

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.masks import FoundParams

MAX_POSITIONS = 16_384  # bound on what one image may cost
POSITIONS_PER_IMAGE = 512  # drawn to learn from
LEARNING_STEPS = 1_000
LOSS_WEIGHT = 10.0  # against the weights' square; at 1 few images teach little
LEARNER_VERSION = 2


class FoundLearner:
    """Learns the convolution from the votes of some images.

    Attributes:
        settings: all that it depends on besides the images; representable in JSON.
        num_images: how many it wants, at most.
    """

    def __init__(self, params: FoundParams, runtime: Runtime) -> None:
        self._params = params
        self.num_images = params.learn_images
        self._teacher = SpectralSource(params.votes(), runtime)
        self._seed = runtime.seed
        self.settings: dict[str, Any] = {
            "version": LEARNER_VERSION,
            "votes": self._teacher.settings,
            **params.model_dump(include={"refine", "solver_iterations", "solver_scale"}),
            "short_side": params.short_side,
        }

    def learn(self, images: Iterable[Image.Image]) -> bytes:
        """The weights, as a safetensors file, from RGB images of any size.

        They are those of a logistic regression: does a position lie on what its image votes for?
        Then the bias is moved until as many positions are more likely salient than not as are voted
        for. Without that, features that tell little call next to nothing salient, for most of an
        image is not.

        Raises:
            PipelineError: no position does, or all of them do.
        """
        parts = [self._examples(image, number) for number, image in enumerate(images)]
        features = np.concatenate([values for values, _ in parts]) if parts else np.empty((0, 1))
        salient = np.concatenate([labels for _, labels in parts]) if parts else np.empty(0, bool)
        if salient.all() or not salient.any():
            raise PipelineError(
                f"mask.source: found: nothing to tell apart: {salient.sum()} of {len(salient)} "
                f"patches of {len(parts)} images are voted for; use more images or another encoder"
            )
        with single_threaded():
            fitted = LogisticRegression(C=LOSS_WEIGHT, max_iter=LEARNING_STEPS)
            fitted.fit(features, salient)
            descending = -np.sort(-fitted.decision_function(features))
        boundary = descending[salient.sum() - 1 : salient.sum() + 1].mean()
        weight = torch.from_numpy(fitted.coef_).float()[..., None, None].contiguous()
        bias = torch.from_numpy(fitted.intercept_ - boundary).float()
        return save({"weight": weight, "bias": bias})

    def _examples(
        self, image: Image.Image, number: int
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Unit features (n, C) at some positions of an image; (n,) whether it votes for them."""
        [mask] = coarse_masks([image], source=self._teacher)
        if self._params.refine:
            mask = refine_mask(
                image,
                mask,
                solver_iterations=self._params.solver_iterations,
                solver_scale=self._params.solver_scale,
            )
        pixels = as_tensors([image], max_pixels=self._teacher.max_pixels)
        [features] = self._teacher.encoders[0](pixels)
        grid = (features.shape[-2], features.shape[-1])
        target = F.interpolate(torch.from_numpy(mask)[None, None].float(), pixels.shape[-2:])
        patch = self._teacher.encoders[0].patch_size
        salient = F.adaptive_avg_pool2d(_padded(target, patch), grid).flatten() > 0.5
        rng = np.random.default_rng([self._seed, number])
        count = min(POSITIONS_PER_IMAGE, len(salient))
        chosen = rng.choice(len(salient), count, replace=False)
        unit = F.normalize(features.flatten(1), dim=0).T
        return unit[chosen].numpy(), salient[chosen].numpy()


class FoundSource:
    """The convolution as a mask source, see `pipeline.methods.masks.MaskSource`."""

    def __init__(self, params: FoundParams, runtime: Runtime, learned: bytes) -> None:
        self._encoder = FeatureEncoder(params, runtime)
        self._head = load(learned)
        self._params = params
        self._seed = runtime.seed
        self.threshold = params.threshold
        self.max_pixels = MAX_POSITIONS * self._encoder.patch_size**2
        self.settings = {
            "source": params.source,
            **self._encoder.settings,
            "weights": hashlib.sha256(learned).hexdigest(),
            "threshold": params.threshold,
            **further_settings(params, runtime.seed),
        }

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> probabilities (B, H, W) of what would be voted for."""
        return self._saliency(images, self._encoder(images))

    def predict_objects(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> probabilities (B, N, H, W), the salient object first."""
        features = self._encoder(images)
        return with_further_objects(
            self._saliency(images, features),
            features,
            patch=self._encoder.patch_size,
            params=self._params,
            seed=self._seed,
            threshold=self.threshold,
        )

    def _saliency(self, images: Tensor, features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=1)
        logits = F.conv2d(unit, self._head["weight"], self._head["bias"])
        height, width = images.shape[-2:]
        patch = self._encoder.patch_size
        padded = (math.ceil(height / patch) * patch, math.ceil(width / patch) * patch)
        full = F.interpolate(logits, padded, mode="bilinear")
        return full[:, 0, :height, :width].sigmoid()


def _padded(masks: Tensor, patch: int) -> Tensor:
    """(..., H, W) with zeros at the right and bottom, to whole patches."""
    return F.pad(masks, (0, -masks.shape[-1] % patch, 0, -masks.shape[-2] % patch))
