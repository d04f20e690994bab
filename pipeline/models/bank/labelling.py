"""Dense labels of which a part is that of similar regions in other images.

Letters: B images, H W pixels, R regions, D channels of a key, C of text space, K label ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.bank.regions import ObjectMap, RegionEncoder, Regions
from pipeline.models.dense.labels import LOGIT_SCALE, label_and_confidence


class RegionBank:
    """Regions by what they look like: an exact index of inner products.

    Args:
        images: name of the image that each region is part of.
        keys: (R, D) float32 unit rows.
        values: (R, C) float32 unit rows.
    """

    def __init__(
        self, images: Sequence[str], keys: NDArray[np.float32], values: NDArray[np.float32]
    ) -> None:
        self._images = np.array(images, dtype=str)
        self._num_of_image = Counter(images)
        self._values = values
        self._index = faiss.IndexFlatIP(keys.shape[1])
        self._index.add(np.ascontiguousarray(keys))

    def nearest_values(
        self, keys: NDArray[np.float32], count: int, *, without: str
    ) -> NDArray[np.float32]:
        """Means (Q, C) of the values of the `count` nearest regions of other images.

        With fewer regions than that it is the mean of all; without any, a row is zero. One query is
        searched at a time, so that its last bits do not depend on the others.

        Args:
            keys: (Q, D) unit rows.
            count: regions a query.
            without: name of the image whose regions do not count.
        """
        means = np.zeros((len(keys), self._values.shape[1]), np.float32)
        wanted = min(count + self._num_of_image[without], len(self._images))
        if wanted == self._num_of_image[without]:
            return means
        for row, key in enumerate(keys):
            _, found = self._index.search(np.ascontiguousarray(key[None]), wanted)
            others = [place for place in found[0] if self._images[place] != without][:count]
            means[row] = self._values[others].mean(axis=0)
        return means


class BankLabeller:
    """A dense labeller whose scores are mixed with those of a region bank.

    Args:
        encoder: of regions, with the labeller.
        bank: made by the same encoder.
        weight: w in (1 - w) own + w bank.
        nearest: number of regions that are averaged.
        logit_scale: factor of cosines where the labeller's scores are probabilities.
    """

    def __init__(
        self,
        encoder: RegionEncoder,
        bank: RegionBank,
        *,
        weight: float,
        nearest: int,
        logit_scale: float = LOGIT_SCALE,
    ) -> None:
        self._encoder = encoder
        self._bank = bank
        self._weight = weight
        self._nearest = nearest
        self._logit_scale = logit_scale

    def label(
        self,
        images: Tensor,
        masks: Sequence[ObjectMap],
        names: Sequence[str],
    ) -> tuple[Tensor, Tensor]:
        """Labels of some images, each with its mask and the name under which the bank has it.

        They are seen one after the other, as scores of all pixels are large.

        The score of a pixel is (1 - w) of its own plus w of its region's: the cosine of a label's
        first name and the mean value of the nearest regions of other images. Where a pixel is of no
        region, or no other image has one, its own score stands.

        Args:
            images: (B, 3, H, W) in [0, 1].
            masks: B masks (H, W); an image without any is cut into clusters of its features.
            names: B names, as the bank has them.

        Returns:
            Label ids (B, H, W) int64 and confidence (B, H, W), as `DenseLabeller.label`.
        """
        found = [
            self._label(image, mask, name)
            for image, mask, name in zip(images.split(1), masks, names, strict=True)
        ]
        labels, confidence = zip(*found, strict=True)
        return torch.cat(labels), torch.cat(confidence)

    def _label(self, image: Tensor, mask: ObjectMap, name: str) -> tuple[Tensor, Tensor]:
        """The same for one image (1, 3, H, W)."""
        scores, [regions] = self._encoder.encode(image, [mask])
        numbers, table = self._scores_of(regions, name, scores.device)

        def mixed(start: int, own: Tensor) -> Tensor:
            return self._mix(own[0], numbers, table[:, start : start + own.shape[1]])[None]

        height, width = image.shape[-2:]
        scale = self._encoder.labeller.logit_scale
        return label_and_confidence(scores, (height, width), scale=scale, change=mixed)

    def _scores_of(
        self, regions: Regions, name: str, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Row of each pixel (H, W) in a table (1 + R, K) of scores; rows of NaN have none."""
        labeller = self._encoder.labeller
        means = self._bank.nearest_values(regions.keys.numpy(), self._nearest, without=name)
        values = F.normalize(torch.from_numpy(means), dim=1)
        scores = values @ labeller.text.float().cpu().T
        if labeller.logit_scale is None:
            scores = (self._logit_scale * scores).softmax(dim=1)
        scores[torch.from_numpy(~means.any(axis=1))] = torch.nan
        table = torch.cat([scores.new_full((1, scores.shape[1]), torch.nan), scores])
        return torch.from_numpy(regions.numbers).long().to(device), table.to(device)

    def _mix(self, own: Tensor, numbers: Tensor, table: Tensor) -> Tensor:
        """Scores (k, H, W) of some labels with those of a table (1 + R, k)."""
        bank = table[numbers].permute(2, 0, 1)
        return torch.where(bank.isnan(), own, (1 - self._weight) * own + self._weight * bank)
