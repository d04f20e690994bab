"""Masks without training: spectral clusters of patch features that vote (SelfMask, section 3).

Features of a ViT are clustered at several k; every cluster is a candidate mask, and the candidate
which agrees best with all the others wins. Letters: C channels, h w feature grid, n = h w
positions, H W pixels, N candidates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pipeline.models.masks.eigenvectors import MAX_DENSE_POSITIONS, smallest_eigenvectors
from pipeline.models.masks.features import FeatureEncoder
from pipeline.models.masks.normalised_cut import further_settings, with_further_objects
from pipeline.models.masks.threads import single_threaded

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.masks import SpectralParams

IOU_EPS = 1e-7
KMEANS_RESTARTS = 10
KMEANS_STEPS = 300
# Bound on what one image may cost: the affinity matrix is quadratic in its area.
MAX_POSITIONS, POSITIONS_PER_PATCH = 6_144, 4


class SpectralSource:
    """Voting clusters as a mask source, see `pipeline.methods.masks.MaskSource`.

    Attributes:
        encoders: those whose features are clustered.
    """

    def __init__(self, params: SpectralParams, runtime: Runtime) -> None:
        self.encoders = [FeatureEncoder(params, runtime)]
        for number, encoder in enumerate(params.more_encoders):
            other = params.model_copy(update={"encoder": encoder})
            field = f"mask.more_encoders[{number}]"
            self.encoders.append(FeatureEncoder(other, runtime, field=field))
        self._params = params
        self._seed = runtime.seed
        self.threshold = 0.5
        smallest = min(encoder.patch_size for encoder in self.encoders)
        self.max_pixels = MAX_POSITIONS // POSITIONS_PER_PATCH * smallest**2
        first, *others = [encoder.settings for encoder in self.encoders]
        precision = first.pop("precision")
        self.settings = {
            "source": params.source,
            **first,
            "clusters": list(params.clusters),
            "seed": runtime.seed,
            "precision": precision,
            **({"more_encoders": [other["encoder"] for other in others]} if others else {}),
            **further_settings(params, runtime.seed),
        }

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> masks (B, H, W) of 0 and 1."""
        return self._vote(images, [encoder(images) for encoder in self.encoders])

    def predict_objects(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> masks (B, N, H, W), the first of which won the vote."""
        maps = [encoder(images) for encoder in self.encoders]
        return with_further_objects(
            self._vote(images, maps),
            maps[0],
            patch=self.encoders[0].patch_size,
            params=self._params,
            seed=self._seed,
        )

    def _vote(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Masks (B, H, W) of 0 and 1 by the features (B, C, h, w) of every encoder."""
        height, width = images.shape[-2:]
        patches = [encoder.patch_size for encoder in self.encoders]
        make = partial(
            spectral_mask,
            size=(height, width),
            padded_size=[
                (math.ceil(height / patch) * patch, math.ceil(width / patch) * patch)
                for patch in patches
            ],
            clusters=self._params.clusters,
            seed=self._seed,
        )
        # Images side by side: each is too small for the threads of the libraries.
        with single_threaded(), ThreadPoolExecutor(torch.get_num_threads()) as threads:
            masks = list(threads.map(make, zip(*maps, strict=True)))
        return torch.from_numpy(np.stack(masks)).float()


def spectral_mask(
    features: Sequence[Tensor],
    *,
    size: tuple[int, int],
    padded_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
    clusters: Sequence[int] = (2, 3, 4),
    seed: int = 0,
) -> NDArray[np.bool_]:
    """Salient mask of one image by voting over the clusters of its feature maps.

    Args:
        features: maps (C, h, w) of one image, from one or several networks or layers; C, h and w
            may differ between them.
        size: (H, W) of the image.
        padded_size: (H', W') that the maps cover, one for all or one each, if the image was padded
            at the right and bottom.
        clusters: every k to cluster each map at.
        seed: of k-means.

    Returns:
        (H, W) mask of the winning cluster.

    Raises:
        ValueError: no features or no clusters are given.
    """
    if not features or not clusters:
        raise ValueError(
            f"got {len(features)} feature maps and {len(clusters)} numbers of clusters"
        )
    height, width = size
    covered = np.broadcast_to(padded_size or size, (len(features), 2)).tolist()
    candidates = []
    for feature_map, full_size in zip(features, covered, strict=True):
        upsampled = F.interpolate(
            feature_map[None].float(), scale_factor=2, mode="bilinear", align_corners=True
        )[0]
        for labels in spectral_clusters(upsampled, clusters, seed=seed):
            one_hot = labels == np.arange(labels.max() + 1)[:, None, None]
            masks = torch.from_numpy(one_hot)[None].to(torch.uint8)
            full = F.interpolate(masks, size=full_size, mode="nearest")[0]
            candidates.append(full[:, :height, :width].numpy().astype(bool))
    stacked = np.concatenate(candidates)
    return stacked[vote(stacked)]


def spectral_clusters(
    features: Tensor, clusters: Sequence[int], *, seed: int = 0
) -> list[NDArray[np.intp]]:
    """Cluster the positions of one feature map at several k.

    The eigenvectors of the largest k hold those of every smaller one, so the decomposition is
    done once.

    Args:
        features: (C, h, w).
        clusters: every k; one above the number of positions counts as that number.
        seed: of k-means.

    Returns:
        One (h, w) label map for each k, labels numbered from 0 by first appearance in raster
        order. There may be fewer than k labels if positions coincide.
    """
    height, width = features.shape[1:]
    limits = [min(k, height * width) for k in clusters]
    with single_threaded():
        vectors = spectral_embedding(features, max(limits), seed=seed)
        return [_kmeans(vectors[:, :k], k, seed=seed).reshape(height, width) for k in limits]


def feature_affinity(features: Tensor) -> NDArray[np.float64]:
    """Cosine similarity between all positions of (C, h, w), (n, n), scaled as a whole to [0, 1].

    Features that are all alike give ones. A position that is like no other, as one whose features
    are all zero after a ReLU may be, is like itself.
    """
    positions = F.normalize(features.detach().cpu().double().flatten(1), dim=0)
    cosine = (positions.T @ positions).numpy()
    low, high = cosine.min(), cosine.max()
    if high - low < 1e-6:
        return np.ones_like(cosine)
    cosine -= low
    cosine /= high - low
    alone = np.flatnonzero(cosine.sum(axis=1) == 0)
    cosine[alone, alone] = 1
    return cosine


def spectral_embedding(
    features: Tensor, count: int, *, seed: int = 0, max_dense: int = MAX_DENSE_POSITIONS
) -> NDArray[np.float64]:
    """The `count` smallest generalised eigenvectors of L v = lambda D v, the constant one included.

    D holds the row sums of the affinity A of (C, h, w) features and L = D - A. With more than
    `max_dense` positions they are found by iteration, which starts at random from `seed`.

    Returns:
        (n, count), columns by ascending eigenvalue, each of unit length in the metric of D.
    """
    affinity = feature_affinity(features)
    return smallest_eigenvectors(affinity, count, seed=seed, max_dense=max_dense)[1]


def _kmeans(points: NDArray[np.float64], k: int, *, seed: int) -> NDArray[np.intp]:
    """(n,) labels of the rows of `points`, numbered by first appearance."""
    model = KMeans(k, n_init=KMEANS_RESTARTS, max_iter=KMEANS_STEPS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than k
        labels = model.fit(points).labels_
    _, first_place, label_rank = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_place))[label_rank]


def vote(candidates: NDArray[np.bool_], *, drop_long: bool = True) -> int:
    """Index of the candidate mask that overlaps most with all others.

    Empty masks do not vote. If nobody is left, every candidate votes. The first of equals wins.

    Args:
        candidates: (N, H, W) masks.
        drop_long: leave out masks whose bounding box spans the whole height or the whole width.

    Returns:
        Index into `candidates` of the mask with the largest sum of IoU over all voters.

    Raises:
        ValueError: there are no candidates.
    """
    if len(candidates) == 0:
        raise ValueError("no candidate masks to vote on")
    masks = candidates.astype(bool)
    keep = masks.any(axis=(1, 2))
    if drop_long:
        keep &= ~_is_long(masks)
    kept = np.flatnonzero(keep) if keep.any() else np.arange(len(masks))
    flat = masks[kept].reshape(len(kept), -1).astype(np.float32)
    intersection = (flat @ flat.T).astype(np.float64)
    areas = intersection.diagonal()
    union = areas[:, None] + areas - intersection
    scores = (intersection / (union + IOU_EPS)).sum(axis=1)
    return int(kept[scores.argmax()])


def _is_long(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,) whether a mask touches two opposite sides of the image."""
    spans_height = masks[:, 0].any(axis=1) & masks[:, -1].any(axis=1)
    spans_width = masks[:, :, 0].any(axis=1) & masks[:, :, -1].any(axis=1)
    return np.asarray(spans_height | spans_width)
