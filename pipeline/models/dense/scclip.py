"""SC-CLIP (Bai et al., 2024): CLIP's last block calibrated by what blocks in its middle say.

Letters: B images, N = 1 + n tokens (class token first), n = h w patches, D width, C joint space.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.clip import ClipVit, DenseOptions
from pipeline.models.dense.affinity import attend_to_alike, average_of_alike, row_slices

# Blocks of a ViT of 12, from 0: those that say what is alike, at first and at last; those summed.
MIDDLE, SHALLOW, FUSED, DEPTH = 8, 3, (3, 9), 12
CLASS_WEIGHT = 0.3
NEIGHBOURS = 30
OUTLIERS = 0.05
LOF_EPS = 1e-10


def scclip(tower: ClipVit, images: Tensor, options: DenseOptions) -> Tensor:
    """Features (B, C, h, w) of normalised images.

    Two inputs of the last block are put through `_calibrated` and what comes out is added: its own
    with outliers repaired, and the sum of the outputs of the fused blocks. The last norm and the
    projection follow. In ViTs of another depth than 12 the blocks lie at the same share of it.
    """
    middle, shallow, first, last = (
        _layer(number, tower.depth) for number in (MIDDLE, SHALLOW, *FUSED)
    )
    fused = range(first, last + 1)
    inside = tower.enter_last(images, options, layers={middle, shallow, *fused})
    features = []
    for number, tokens in enumerate(inside.tokens):
        layers = {layer: states[number] for layer, states in inside.layers.items()}
        calibrated = partial(
            _calibrated, tower, options, middle=layers[middle][1:], shallow=layers[shallow][1:]
        )
        patches = repaired(tokens[1:], inside.grid)
        summed = torch.stack([layers[layer] for layer in fused]).sum(dim=0)
        features.append(calibrated(torch.cat([tokens[:1], patches])) + calibrated(summed))
    joint = tower.leave(torch.stack(features), options)
    return joint.transpose(1, 2).unflatten(2, inside.grid)


def _layer(number: int, depth: int) -> int:
    """A block of a ViT of 12 in one of another depth, before the last; -1 is what enters all."""
    return min(number * depth // DEPTH, depth - 2)


def _calibrated(
    tower: ClipVit, options: DenseOptions, tokens: Tensor, *, middle: Tensor, shallow: Tensor
) -> Tensor:
    """Tokens (N, D) through the last block: patches (n, D).

    They are averaged where the patches of the middle block (n, D) are alike, attend to each other
    by half that likeness and half their keys, get a share of the class token's value, and are
    averaged once more where those of the shallow block are alike. There is no residual and no MLP.
    """
    averaged = average_of_alike(middle, tokens[1:])
    normed = tower.norm(torch.cat([tokens[:1], averaged]), options)
    _, keys, values = (part[0] for part in tower.heads(normed[None]))
    keys, own, others = keys[:, 1:], values[:, :1], values[:, 1:]
    coherent = attend_to_alike(middle, others, shift=1.0)
    attended = (coherent + F.scaled_dot_product_attention(keys, keys, others)) / 2
    return average_of_alike(shallow, tower.merge((attended + CLASS_WEIGHT * own)[None])[0])


def repaired(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (n, D) whose outliers are the mean of the others among their 8 neighbours.

    Outliers are the 5 % with the largest local outlier factor, rounded down. One without any other
    around it stays as it is.
    """
    outliers = int(OUTLIERS * len(patches))
    if not outliers:
        return patches
    strange = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
    strange[local_outlier_factors(patches).topk(outliers).indices] = True
    valid = (~strange).to(patches.dtype)[:, None]
    sums, counts = (_means_around(part, grid) for part in (patches * valid, valid))
    return torch.where(strange[:, None] & (counts > 0), sums / counts.clamp(min=LOF_EPS), patches)


def _means_around(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means of values (n, D) over the 3 x 3 patches around each, zeros beyond the edge."""
    maps = values.T.unflatten(1, grid)[None]
    return F.avg_pool2d(maps, 3, stride=1, padding=1)[0].flatten(1).T


def local_outlier_factors(points: Tensor) -> Tensor:
    """Local outlier factors (n,) of points (n, D), n > 1, by the 30 nearest others at most.

    Breunig et al. (SIGMOD 2000). About 1 inside of a cluster, larger where the neighbours lie more
    closely than the point.
    """
    neighbours = min(NEIGHBOURS, len(points) - 1)

    def nearest(rows: slice) -> tuple[Tensor, Tensor]:
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(points[rows], points, compute_mode=exact)
        distances.diagonal(rows.start).fill_(torch.inf)
        return distances.topk(neighbours, largest=False)

    parts = [nearest(rows) for rows in row_slices(len(points))]
    distances, index = (torch.cat(part) for part in zip(*parts, strict=True))
    reach = torch.maximum(distances, distances[:, -1][index])
    density = 1 / (reach.mean(dim=1) + LOF_EPS)
    return density[index].mean(dim=1) / density
