"""LPOSS: scores of patches, then of pixels, spread along a graph (Stojnic et al., 2025).

The scores X solve (I - a W) X = (1 - a) Y, where Y are those of another labeller and W is a graph's
affinity, normalised by its degrees. The factor 1 - a, which the paper leaves out, changes no label;
it keeps scores in the range that their softmax expects.
Letters: B images, N nodes, K label ids, D channels of values, C joint space, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.clip import pad_to_multiple
from pipeline.models.dense.labels import labels_one_by_one
from pipeline.models.dense.pixel_graph import PixelGraph
from pipeline.models.dense.windows import (
    Place,
    cut_windows,
    features_in_windows,
    joined,
    joined_features,
    over_windows,
)
from pipeline.models.layers.interpolate import upsample

if TYPE_CHECKING:
    from pipeline.methods.dense import LpossSection, TextLabeller
    from pipeline.vocabulary.categories import Names

ALPHA = 0.95
TOLERANCE, MAX_STEPS = 1e-6, 10
COSINE_POWER, DISTANCE_SCALE = 3, 0.01  # of pixels
ROWS_AT_ONCE = 1024  # of the matrix of cosines, of which only the neighbours are kept

Apply = Callable[[Tensor], Tensor]


class ValueEncoder(Protocol):
    """What gives values of patches: a CLIP or a DINO."""

    mean: Tensor

    def patch_features(self, images: Tensor, *, facet: Literal["value"]) -> Tensor:
        """Values (B, D, h, w) of images in [0, 1]."""

    def fingerprint(self) -> str:
        """Of geometry and weights."""


class Lposs:
    """A labeller's scores, spread between patches of like values; see `DenseLabeller`.

    Args:
        labeller: whose scores they are.
        encoder: its values of the last block make the graph.
        params: number of neighbours, and windows, whose patches share a graph.
        with_pixels: spread once more between neighbouring pixels of like colour (LPOSS+).
    """

    def __init__(
        self,
        labeller: TextLabeller,
        encoder: ValueEncoder,
        params: LpossSection,
        *,
        with_pixels: bool,
    ) -> None:
        self._labeller = labeller
        self._encoder = encoder
        self._params = params
        self._with_pixels = with_pixels
        self.patch_size = labeller.patch_size
        self.gives_pixels = with_pixels or params.windows is not None
        self.logit_scale = labeller.logit_scale
        self.text = labeller.text

    @property
    def settings(self) -> dict[str, Any]:
        """All that labels depend on besides image and names."""
        return {
            **self._labeller.settings,
            "graph": self._encoder.fingerprint(),
            "spread": "pixels" if self._with_pixels else "patches",
        }

    def select(self, label_ids: Sequence[int]) -> Lposs:
        """The same for some label ids, in this order."""
        return self._with(self._labeller.select(label_ids))

    def with_text(self, text: Tensor) -> Lposs:
        """The same with other unit rows (R, C) in place of the label ids'."""
        return self._with(self._labeller.with_text(text))

    def embed(self, names: Names, templates: Sequence[str]) -> Tensor:
        """Unit rows (1 + K, C) of names in some templates."""
        return self._labeller.embed(names, templates)

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, K, h, w), or (B, K, H, W) of pixels."""
        return self.scores_and_features(images)[0]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The labeller's features (B, C, h, w), which nothing is spread for."""
        return features_in_windows(
            self._labeller.features, images, self._params.windows, patch_size=self.patch_size
        )

    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the labeller's features (B, C, h, w)."""
        scores, features = zip(*map(self._of_image, images.split(1)), strict=True)
        return torch.cat(scores), torch.cat(features)

    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> label ids (B, H, W) int64, confidence (B, H, W)."""
        return labels_one_by_one(self.scores, images, scale=self.logit_scale)

    def _with(self, labeller: TextLabeller) -> Lposs:
        return Lposs(labeller, self._encoder, self._params, with_pixels=self._with_pixels)

    @torch.no_grad()
    def _of_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and features of one image (1, 3, H, W)."""
        size = image.shape[-2:]
        places, crops = cut_windows(image, self._params.windows)
        scores, features, values = over_windows(self._seen, crops)
        window = crops[0].shape[-2:]
        # A tolerance of 1e-6 asks for float32, even where the networks ran in less.
        with torch.autocast(image.device.type, enabled=False):
            graph = patch_graph(
                torch.cat([maps[0].flatten(1).T for maps in values]),
                patch_positions(places, window, scores[0].shape[-2:]).to(image.device),
                self._params.neighbours,
            )
            scores = _spread_patches(scores, graph)
            if len(places) == 1 and not self._with_pixels:
                return scores[0], features[0]
            whole = joined(scores, places, window, size)
            if self._with_pixels:
                pixels = PixelGraph(image[0])
                flat = propagate(pixels.apply, whole[0].flatten(1).T)
                whole = flat.T.reshape(whole.shape)
        return whole, joined_features(features, places, window, size, patch_size=self.patch_size)

    def _seen(self, crops: Tensor) -> list[Tensor]:
        """Scores, features and values, on the grid of the scores."""
        scores, features = self._labeller.scores_and_features(crops)
        # As the labeller does, zeros after the normalisation: their patches are the same.
        padded = pad_to_multiple(crops - self._encoder.mean, self.patch_size) + self._encoder.mean
        values = self._encoder.patch_features(padded, facet="value").float()
        return [scores.float(), features.float(), upsample(values, scores.shape[-2:])]


def _spread_patches(scores: Sequence[Tensor], graph: Tensor) -> list[Tensor]:
    """Scores (1, K, h, w) of windows, after they were spread along a graph of all their patches."""
    shape = scores[0].shape
    nodes = torch.cat([maps[0].flatten(1).T for maps in scores])
    spread = propagate(lambda vectors: torch.sparse.mm(graph, vectors), nodes)
    return [part.T.reshape(shape) for part in spread.split(shape[-2] * shape[-1])]


def patch_positions(places: Sequence[Place], window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Centres (N, 2), row and column in pixels, of the patches of windows, one after the other.

    Args:
        places: (top, left) of every window.
        window: height and width.
        grid: patches along both.
    """
    rows, columns = (
        (torch.arange(cells) + 0.5) * side / cells for cells, side in zip(grid, window, strict=True)
    )
    inside = torch.cartesian_prod(rows, columns)
    return torch.cat([inside + torch.tensor(place) for place in places])


def patch_graph(values: Tensor, positions: Tensor, neighbours: int) -> Tensor:
    """The normalised affinity (N, N), sparse, of patches with values (N, D) at positions (N, 2).

    A patch is joined to the `neighbours` others of the largest cosine, or to all where there are no
    more, with max(cosine, 0)^3 exp(-0.01 distance). The mean with its transpose is divided by the
    roots of both patches' sums.
    """
    unit = F.normalize(values.float(), dim=1)
    count = min(neighbours, len(unit) - 1)
    found = []
    for start in range(0, len(unit), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        cosines = unit[part] @ unit.T
        own = torch.arange(start, start + len(cosines), device=unit.device)
        cosines[own - start, own] = -torch.inf
        nearest, others = cosines.topk(count, dim=1)
        distances = (positions[part, None] - positions[others]).norm(dim=2)
        weights = nearest.clamp(min=0) ** COSINE_POWER * (-DISTANCE_SCALE * distances).exp()
        found.append(
            (own[:, None].expand_as(others).flatten(), others.flatten(), weights.flatten())
        )
    rows, columns, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    both = torch.stack((torch.cat((rows, columns)), torch.cat((columns, rows))))
    halves = torch.cat((weights, weights)) / 2
    degrees = halves.new_zeros(len(unit)).index_add_(0, both[0], halves)
    scale = inverse_roots(degrees)
    shape = (len(unit), len(unit))
    values = halves * scale[both[0]] * scale[both[1]]
    return torch.sparse_coo_tensor(both, values, shape, check_invariants=False).coalesce()


def inverse_roots(degrees: Tensor) -> Tensor:
    """1 / sqrt(degree); 0 for a node without neighbours."""
    return torch.where(degrees > 0, degrees.clamp(min=torch.finfo(degrees.dtype).tiny).rsqrt(), 0)


def propagate(apply: Apply, start: Tensor) -> Tensor:
    """The solution of (I - a W) X = (1 - a) Y by conjugate gradients, from zero.

    Args:
        apply: vectors (N, K) -> W times them; W is symmetric.
        start: Y, (N, K) float32; each column is solved until its residual is at most 1e-6 of its
            length, or for 10 steps.

    Returns:
        X, (N, K).
    """
    solution, residual = torch.zeros_like(start), start.clone()
    direction, square = residual, residual.square().sum(dim=0)
    enough = TOLERANCE**2 * square
    for _ in range(MAX_STEPS):
        is_open = square > enough
        if not is_open.any():
            break
        image = direction - ALPHA * apply(direction)
        curvature = (direction * image).sum(dim=0)
        step = torch.where(is_open, square / curvature, 0)
        solution = solution + step * direction
        residual = residual - step * image
        new_square = residual.square().sum(dim=0)
        direction = residual + torch.where(is_open, new_square / square, 0) * direction
        square = torch.where(is_open, new_square, square)
    return (1 - ALPHA) * solution
