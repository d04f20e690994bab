"""Regions of an image, and what a vision encoder and CLIP say of each.

Letters: B images, H W pixels, R regions of an image, D channels of the vision encoder, C of CLIP's
text space, h w a patch grid, K label ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from pipeline.formats.images import resize_nearest
from pipeline.models.dense.objects import coverage
from pipeline.models.layers.regions import components_of_values
from pipeline.models.masks.spectral import MAX_DENSE_POSITIONS, spectral_clusters

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.dense import ObjectLabeller

# To be raised when regions or their means change though their settings do not.
REGION_VERSION = 2
# (H, W): the numbers of an image's objects from 1, or where its only one is.
ObjectMap = NDArray[np.integer[Any] | np.bool_]


class PatchEncoder(Protocol):
    """What gives features of patches to compare regions by."""

    def patch_features(self, images: Tensor, *, facet: Literal["key", "token"]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, D, h, w)."""

    def fingerprint(self) -> str:
        """Changes whenever the features may."""


class Regions(NamedTuple):
    """The regions of one image.

    Attributes:
        numbers: (H, W) int32, of each pixel's region from 1; 0 belongs to none.
        shares: (R,) float32 of the image's pixels.
        keys: (R, D) float32 unit rows: what they look like.
        values: (R, C) float32 unit rows: what CLIP takes them for.
    """

    numbers: NDArray[np.int32]
    shares: NDArray[np.float32]
    keys: Tensor
    values: Tensor


class RegionEncoder:
    """Cuts images into regions and averages features inside of them.

    Args:
        labeller: whose dense features are the values.
        patches: whose features are the keys.
        facet: of `patches`.
        clusters: number of clusters that an image without a mask is cut into.
        min_share: a region of less of the image is none.
        runtime: device and precision.

    Attributes:
        labeller: the same.
        settings: all that regions depend on besides image and mask; representable in JSON.
    """

    def __init__(
        self,
        labeller: ObjectLabeller,
        patches: PatchEncoder,
        *,
        facet: Literal["key", "token"],
        clusters: int,
        min_share: float,
        runtime: Runtime,
    ) -> None:
        self.labeller = labeller
        self._patches = patches
        self._facet = facet
        self._clusters = clusters
        self._min_share = min_share
        self._runtime = runtime
        self.settings: dict[str, Any] = {
            "version": REGION_VERSION,
            "encoder": patches.fingerprint(),
            "facet": facet,
            "clusters": clusters,
            "min_share": min_share,
            "labeller": labeller.settings,
            "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
        }

    @torch.no_grad()
    def encode(self, images: Tensor, masks: Sequence[ObjectMap]) -> tuple[Tensor, list[Regions]]:
        """The labeller's own scores and the regions of some images.

        Args:
            images: (B, 3, H, W) in [0, 1].
            masks: B masks (H, W).

        Returns:
            Scores (B, K, h, w) float32 on the device, and the regions of each image, on the CPU.
        """
        images = images.to(self._runtime.device)
        with self._runtime.autocast():
            scores, values = self.labeller.scores_and_features(images)
        return scores.float(), self._each(images, masks, values)

    @torch.no_grad()
    def regions(self, images: Tensor, masks: Sequence[ObjectMap]) -> list[Regions]:
        """The regions alone, for which nothing is done to the scores; see `encode`."""
        images = images.to(self._runtime.device)
        with self._runtime.autocast():
            values = self.labeller.features(images)
        return self._each(images, masks, values)

    def _each(
        self,
        images: Tensor,
        masks: Sequence[ObjectMap],
        values: Tensor,
    ) -> list[Regions]:
        """The regions of images with values (B, C, h, w)."""
        with self._runtime.autocast():
            keys = self._patches.patch_features(images, facet=self._facet)
        each = zip(masks, keys.float().cpu(), values.float().cpu(), strict=True)
        return [self._regions(*one) for one in each]

    def _regions(self, mask: ObjectMap, keys: Tensor, values: Tensor) -> Regions:
        if mask.any():
            parts = mask.astype(np.int32)
        else:
            parts = resize_nearest(feature_clusters(keys, self._clusters), mask.shape)
        numbers = numbered_components(parts, min_share=self._min_share)
        counts = np.bincount(numbers.ravel(), minlength=1)[1:]
        return Regions(
            numbers,
            (counts / numbers.size).astype(np.float32),
            region_means(keys, numbers),
            region_means(values, numbers),
        )


def numbered_components(
    parts: NDArray[np.integer[Any]], *, min_share: float = 0.0
) -> NDArray[np.int32]:
    """Number the components of every value of a map, see `components_of_values`.

    Args:
        parts: (H, W), such as a mask of numbered objects: the components of each and those of what
            they leave are numbered.
        min_share: a component of less of the map is left out.

    Returns:
        (H, W) numbers from 1 by falling value, then as they come in raster order; 0 is left out.
    """
    values = np.unique(parts)[::-1]
    numbers = components_of_values(parts, values, smallest=min_share * parts.size)
    return numbers.astype(np.int32)


def feature_clusters(features: Tensor, clusters: int) -> NDArray[np.int32]:
    """Spectral clusters (h, w) of features (D, h, w), of a coarser map where that is large."""
    height, width = features.shape[1:]
    shrink = (MAX_DENSE_POSITIONS / (height * width)) ** 0.5
    if shrink < 1:
        grid = (max(1, int(height * shrink)), max(1, int(width * shrink)))
        features = F.adaptive_avg_pool2d(features[None], grid)[0]
    [labels] = spectral_clusters(features, [clusters])
    return labels.astype(np.int32)


def region_means(features: Tensor, numbers: NDArray[np.int32]) -> Tensor:
    """Unit means (R, C) over each region of the unit features (C, h, w), upsampled bilinearly.

    Args:
        features: of any length, float32, on the CPU.
        numbers: (H, W), see `Regions`; every number up to R is there.
    """
    crops = [
        (box, numbers[box] == number)
        for number, box in enumerate(ndimage.find_objects(numbers), start=1)
    ]
    if not crops:
        return features.new_zeros(0, len(features))
    weights = coverage(crops, numbers.shape, features.shape[-2:])
    return F.normalize(weights.flatten(1) @ F.normalize(features, dim=0).flatten(1).T, dim=1)
