"""Names of regions by their pixels and by their crops.

A token sees little of a thing. CLIP was trained to say what a whole image shows, so that its
embedding of a region's crop is a second opinion, as two-stage segmenters of open vocabulary have
it. It is of the encoder as it was before training. The trained network may look at the crop, too,
where the region is larger than in the image and alone.

Letters: K categories, N regions, C joint embedding, H W pixels, h w token grid, S side of CLIP's
input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.formats.labels import LABEL_TYPE, LabelMap
from pipeline.models.clip.encoder import ClipEncoder
from pipeline.models.layers.regions import boxes_of_regions, regions_of_one_label, shares_of_regions
from pipeline.params.base import CropNamesParams

CROPS_AT_ONCE = 32
MIN_SIDE = 2.0  # pixels of a crop


@dataclass(frozen=True)
class CropNamer:
    """Chooses among categories for parts of an image.

    Attributes:
        encoder: gives the frozen CLIP; it is asked when there is a first region.
        network: the trained one, images (N, 3, S, S) in [0, 1] -> scores (N, 1 + K, h, w), the
            background's first.
        text: (K, C) unit rows, that of label id 1 first.
        logit_scale: factor of the network's scores in their softmax.
        params: see `CropNamesParams`.
    """

    encoder: Callable[[], ClipEncoder]
    network: Callable[[Tensor], Tensor]
    text: Tensor
    logit_scale: float
    params: CropNamesParams

    def relabelled(self, labels: LabelMap, scores: Tensor, image: Tensor) -> LabelMap:
        """Label ids (H, W) whose connected regions have been named again.

        A region smaller than a token keeps its name.

        Args:
            labels: (H, W) label ids, 0 is background.
            scores: (K, h, w) of the categories.
            image: (3, H', W') in [0, 1] of which they are.
        """
        grid = (scores.shape[1], scores.shape[2])
        numbers = regions_of_one_label(labels, max(1, labels.size // (grid[0] * grid[1])))
        boxes = torch.from_numpy(boxes_of_regions(numbers))
        if not len(boxes):
            return labels
        shares = torch.from_numpy(shares_of_regions(numbers, grid)).to(scores)
        named = self.label_ids(image, boxes, shares.flatten(1) @ scores.flatten(1).T)
        new_ids = torch.cat((named.new_zeros(1), named)).cpu().numpy().astype(LABEL_TYPE)
        labels = labels.copy()
        labels[numbers > 0] = new_ids[numbers[numbers > 0]]
        return labels

    def label_ids(self, image: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
        """Label ids (N,), int64, of regions.

        Args:
            image: (3, H', W') in [0, 1].
            boxes: (N, 4) top, left, bottom and right, as shares of the image's sides.
            scores: (N, K) means over the pixels of each.
        """
        clip, params = self.encoder(), self.params
        crops = [crop(image, box, params.margin, clip.image_size) for box in boxes.tolist()]
        looks = [
            (params.weight, self._seen_by_clip),
            (params.student_weight, self._seen_by_network),
        ]
        of_pixels = (self.logit_scale * scores).log_softmax(dim=1)
        votes = (1 - params.weight - params.student_weight) * of_pixels
        for weight, look in looks:
            if weight and crops:
                votes = votes + weight * _in_batches(look, crops).to(votes)
        return 1 + votes.argmax(dim=1)

    def _seen_by_clip(self, crops: Tensor) -> Tensor:
        """Log-probabilities (N, K) of crops (N, 3, S, S) in CLIP's own softmax."""
        clip = self.encoder()
        return (clip.logit_scale * clip.encode_images(crops) @ self.text.T).log_softmax(dim=1)

    def _seen_by_network(self, crops: Tensor) -> Tensor:
        """The same by the trained network: a mean of the tokens, as far as they are objects."""
        scores = self.logit_scale * self.network(crops).flatten(2)
        is_object = 1 - scores.softmax(dim=1)[:, :1]
        total = is_object.sum(dim=2).clamp(min=torch.finfo(scores.dtype).tiny)
        of_tokens = scores[:, 1:].log_softmax(dim=1)
        return ((of_tokens * is_object).sum(dim=2) / total).log_softmax(dim=1)


def _in_batches(look: Callable[[Tensor], Tensor], crops: list[Tensor]) -> Tensor:
    """What is seen in crops, `CROPS_AT_ONCE` at a time."""
    starts = range(0, len(crops), CROPS_AT_ONCE)
    return torch.cat([look(torch.stack(crops[start : start + CROPS_AT_ONCE])) for start in starts])


def no_encoder() -> ClipEncoder:
    """The encoder of a student that was made without one.

    Raises:
        ValueError: always.
    """
    raise ValueError("crop_names: the encoder that training began with is not at hand")


def crop(image: Tensor, box: Sequence[float], margin: float, side: int) -> Tensor:
    """The square around a box, at CLIP's size.

    Where it would leave the image it is moved inside; what is wider than the image is cut off and
    then squeezed.

    Args:
        image: (3, H, W) in [0, 1].
        box: top, left, bottom and right, as shares of the image's sides.
        margin: beyond every side, as a share of the longer one.
        side: S.

    Returns:
        (3, S, S) in [0, 1].
    """
    height, width = image.shape[1:]
    top, left, bottom, right = box
    longer = max((bottom - top) * height, (right - left) * width) * (1 + 2 * margin)
    rows = _span((top + bottom) / 2, longer, height)
    columns = _span((left + right) / 2, longer, width)
    part = image[None, :, rows, columns]
    resized = F.interpolate(
        part, size=(side, side), mode="bicubic", align_corners=False, antialias=True
    )
    return resized[0].clamp(0, 1)


def _span(centre: float, length: float, pixels: int) -> slice:
    """Pixels of one axis around `centre`, a share of it."""
    length = min(max(length, MIN_SIDE), pixels)
    start = min(max(centre * pixels - length / 2, 0.0), pixels - length)
    return slice(round(start), max(round(start + length), round(start) + 1))
