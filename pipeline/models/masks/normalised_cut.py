"""Objects by normalised cuts of patch features, one after the other.

Shi and Malik (2000) on the graph of TokenCut (Wang et al., 2022), repeated on what is left as in
MaskCut (Wang et al., 2023). Letters: B images, N objects, C channels, h w feature grid, n positions
that are left, H W pixels.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from pipeline.models.masks.eigenvectors import smallest_eigenvectors
from pipeline.models.masks.threads import single_threaded

if TYPE_CHECKING:
    from pipeline.methods.masks import ObjectsParams

WEAK = 1e-5  # weight of positions that are not alike; 0 would part the graph
MAX_POSITIONS = 4_096  # bound on what one image may cost: the affinity is quadratic in its area
MAX_SPECKS = 8  # cut off and left out, before an image counts as without an object
TIE = 1e-6
CUT_THRESHOLD = 0.5  # of what is cut of patches and enlarged, which is no network's probability


def cut_settings(params: ObjectsParams, seed: int) -> dict[str, object]:
    """All that the cuts depend on besides features; representable in JSON."""
    return {**params.model_dump(include={"objects", "tau", "max_cut", "min_area"}), "seed": seed}


def further_settings(params: ObjectsParams, seed: int) -> dict[str, object]:
    """The same for the objects after the first: nothing if there are none."""
    if params.objects == 1:
        return {}
    return {**cut_settings(params, seed), "cut_threshold": CUT_THRESHOLD}


def with_further_objects(
    first: Tensor,
    features: Tensor,
    *,
    patch: int,
    params: ObjectsParams,
    seed: int,
    threshold: float = 0.5,
) -> Tensor:
    """The first object of each image, and those that are cut of what it leaves.

    Args:
        first: (B, H, W) mask probabilities.
        features: (B, C, h, w) of the images, padded at the right and bottom to whole patches; they
            are averaged on a smaller grid if there are more than `MAX_POSITIONS`.
        patch: side of a patch in pixels.
        params: number of objects, and when to stop.
        seed: see `cut_objects`.
        threshold: above which a pixel is the first object's, whose positions are those that it
            covers by more than half.

    Returns:
        (B, N, H, W) mask probabilities, float32; empty where there is no such object.
    """
    if params.objects == 1:
        return first[:, None]
    height, width = first.shape[-2:]
    scale = min(1.0, math.sqrt(MAX_POSITIONS / features[0, 0].numel()))
    rows, columns = features.shape[-2:]
    grid = (max(1, int(rows * scale)), max(1, int(columns * scale)))
    features = F.adaptive_avg_pool2d(features, grid)
    covered = F.pad((first > threshold).float(), (0, -width % patch, 0, -height % patch))
    taken = F.adaptive_avg_pool2d(covered[:, None], grid)[:, 0] > 0.5
    others = cut_batch(
        features,
        taken,
        count=params.objects - 1,
        size=(height, width),
        patch=patch,
        params=params,
        seed=seed,
    )
    return torch.cat((first[:, None], others), dim=1)


def cut_batch(
    features: Tensor,
    taken: Tensor,
    *,
    count: int,
    size: tuple[int, int],
    patch: int,
    params: ObjectsParams,
    seed: int,
) -> Tensor:
    """The objects of each image by `cut_objects`, at the size of the images.

    Args:
        features: (B, C, h, w) of the images, padded at the right and bottom to whole patches.
        taken: (B, h, w) boolean, see `cut_objects`.
        count: of objects, at most.
        size: (H, W) of the images.
        patch: side of a patch in pixels.
        params: when to stop.
        seed: see `cut_objects`.

    Returns:
        (B, count, H, W) float32 in [0, 1].
    """
    cut = partial(
        cut_objects,
        count=count,
        tau=params.tau,
        max_cut=params.max_cut,
        min_area=params.min_area,
        seed=seed,
    )
    with single_threaded(), ThreadPoolExecutor(torch.get_num_threads()) as threads:
        grids = list(threads.map(cut, features.float().cpu(), taken.numpy()))
    masks = torch.from_numpy(np.stack(grids)).float()
    padded = [math.ceil(side / patch) * patch for side in size]
    return F.interpolate(masks, padded, mode="bilinear")[..., : size[0], : size[1]]


def cut_objects(
    features: Tensor,
    taken: NDArray[np.bool_] | None = None,
    *,
    count: int,
    tau: float,
    max_cut: float,
    min_area: float,
    seed: int = 0,
) -> NDArray[np.bool_]:
    """Objects of one image, each cut of what those before it leave.

    Args:
        features: (C, h, w).
        taken: (h, w) positions of which nothing is cut; none by default.
        count: of objects, at most.
        tau: two positions are alike where the cosine of their features is larger.
        max_cut: value of a cut, the second smallest eigenvalue of the normalised Laplacian, above
            which nothing more is cut.
        min_area: share of the grid; what is smaller is a speck, left out of objects and of what is
            left.
        seed: of the iteration that finds eigenvectors of many positions.

    Returns:
        (count, h, w) masks that do not overlap; the last ones are empty if there are fewer objects.
    """
    left = np.ones(features.shape[1:], bool) if taken is None else ~taken
    objects = np.zeros((count, *left.shape), bool)
    found = 0
    for _ in range(count + MAX_SPECKS):
        if found == count:
            break
        part = _foreground(features, left, tau=tau, max_cut=max_cut, seed=seed)
        if part is None:
            break
        left &= ~part
        if part.mean() >= min_area:
            objects[found] = part
            found += 1
    return objects


def _foreground(
    features: Tensor, left: NDArray[np.bool_], *, tau: float, max_cut: float, seed: int
) -> NDArray[np.bool_] | None:
    """One object (h, w) cut of the positions that are left (h, w); None if they are one thing.

    It is the connected part, around the position with the largest absolute value in the second
    smallest eigenvector, of that position's side of the vector's mean.
    """
    places = np.flatnonzero(left)
    if len(places) < 2:
        return None
    affinity = patch_affinity(features.flatten(1)[:, places], tau)
    values, vectors = smallest_eigenvectors(affinity, 2, seed=seed)
    if values[1] > max_cut:
        return None
    vector = vectors[:, 1]
    size = np.abs(vector)
    core = int((size >= size.max() * (1 - TIE)).argmax())  # the first of equals
    above = vector > vector.mean()
    side = np.zeros(left.shape, bool)
    side.flat[places] = above == above[core]
    parts, _ = ndimage.label(side)
    return np.asarray(parts == parts.flat[places[core]])


def patch_affinity(features: Tensor, tau: float) -> NDArray[np.float64]:
    """(n, n): 1 where the cosine of two of (C, n) features is above `tau`, else almost 0."""
    unit = F.normalize(features.detach().cpu().double(), dim=0)
    return np.where((unit.T @ unit).numpy() > tau, 1.0, WEAK)
