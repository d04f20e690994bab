"""What may be put around any dense labeller: synonyms, windows, refinement, a threshold.

Letters: B images, K label ids, R rows of text, C features, H W pixels, h w grid of patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from pipeline.models.dense.labels import labels_one_by_one
from pipeline.models.dense.windows import (
    cut_windows,
    features_in_windows,
    joined,
    joined_features,
    over_windows,
)
from pipeline.models.layers.interpolate import upsample
from pipeline.models.layers.pamr import refined

if TYPE_CHECKING:
    from pipeline.methods.dense import (
        DenseLabeller,
        ObjectLabeller,
        PseudoLabelParams,
        WindowParams,
    )


class LabellerWithOptions:
    """A dense labeller with the options of its section, see `PseudoLabelParams`.

    Args:
        labeller: of R rows: the names of all label ids.
        params: the options.
        rows: the rows of each of K label ids, the first of them its own name's.
        windows: of `params`; None where the labeller sees to them itself.
        texts: what stands for a category in prompts, see `Names`; they are in the settings.
        background: place of the background among the K, None where no pixel may be background.
    """

    def __init__(
        self,
        labeller: DenseLabeller,
        params: PseudoLabelParams,
        rows: Sequence[Sequence[int]],
        *,
        windows: WindowParams | None,
        texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
        background: int | None = 0,
    ) -> None:
        self._labeller = labeller
        self._params = params
        self._rows = rows
        self._windows = windows
        self._texts = texts
        self._background = background
        self.patch_size = labeller.patch_size

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the labeller, the options that are on, and texts if there are any."""
        texts = {"texts": {name: list(words) for name, words in self._texts.items()}}
        options = self._params.options()
        return {**self._labeller.settings, **options, **(texts if self._texts else {})}

    @property
    def logit_scale(self) -> float | None:
        """That of the labeller; None with a threshold, which makes scores probabilities."""
        return None if self._has_threshold else self._labeller.logit_scale

    @property
    def text(self) -> Tensor:
        """Unit rows (K, C) of the label ids' own names."""
        return cast("ObjectLabeller", self._labeller).text[[rows[0] for rows in self._rows]]

    @property
    def _has_threshold(self) -> bool:
        return self._params.background_threshold is not None and self._background is not None

    def select(self, label_ids: Sequence[int]) -> LabellerWithOptions:
        """The same for some label ids, in this order."""
        chosen = list(label_ids)
        kept = [row for label_id in chosen for row in self._rows[label_id]]
        places = iter(range(len(kept)))
        return LabellerWithOptions(
            self._labeller.select(kept),
            self._params,
            [[next(places) for _ in self._rows[label_id]] for label_id in chosen],
            windows=self._windows,
            texts=self._texts,
            background=chosen.index(self._background) if self._background in chosen else None,
        )

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> scores (B, K, H, W), or (B, K, h, w) of patches."""
        return self._refined(images, with_features=False)[0]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The labeller's features (B, C, h, w) of patches, as all windows have them."""
        labeller = cast("ObjectLabeller", self._labeller)
        return features_in_windows(
            labeller.features, images, self._windows, patch_size=self.patch_size
        )

    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `scores` gives, and features (B, C, h, w) of patches."""
        scores, features = self._refined(images, with_features=True)
        return scores, features

    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> label ids (B, H, W) int64, confidence (B, H, W)."""
        return labels_one_by_one(self.scores, images, scale=self.logit_scale)

    @torch.no_grad()
    def _refined(self, images: Tensor, *, with_features: bool) -> list[Tensor]:
        """Scores, and features where they are asked for."""
        size = images.shape[-2:]
        scores, *features = self._seen_in_windows(images, with_features=with_features)
        if (pamr := self._params.pamr) is not None:
            scores = refined(scores, images, pamr)
        if self._has_threshold:
            scores = with_threshold(
                upsample(scores, size),
                cast(float, self._params.background_threshold),
                background=cast(int, self._background),
                scale=self._labeller.logit_scale,
            )
        return [scores, *features]

    def _seen_in_windows(self, images: Tensor, *, with_features: bool) -> list[Tensor]:
        windows = self._windows
        if windows is None:
            return self._seen(images, with_features=with_features)
        size = images.shape[-2:]
        places, crops = cut_windows(images, windows)
        scores, *features = over_windows(
            lambda crop: self._seen(crop, with_features=with_features), crops
        )
        window = crops[0].shape[-2:]
        return [
            joined(scores, places, window, size),
            *(
                joined_features(maps, places, window, size, patch_size=self.patch_size)
                for maps in features
            ),
        ]

    def _seen(self, images: Tensor, *, with_features: bool) -> list[Tensor]:
        """Scores (B, K, h, w) that a label id's best name has, and features if asked for."""
        if with_features:
            scores, *features = cast("ObjectLabeller", self._labeller).scores_and_features(images)
        else:
            scores, features = self._labeller.scores(images), []
        return [best_of_rows(scores.float(), self._rows), *(maps.float() for maps in features)]


def best_of_rows(scores: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Scores (B, K, h, w) of label ids from those (B, R, h, w) of their rows: the largest."""
    if len(rows) == scores.shape[1]:
        return scores
    return torch.stack([scores[:, list(own)].amax(dim=1) for own in rows], dim=1)


def with_threshold(
    scores: Tensor, threshold: float, *, background: int, scale: float | None
) -> Tensor:
    """Probabilities among which no category wins that has less than a threshold.

    There the background's is raised to it.

    Args:
        scores: (B, K, H, W).
        threshold: in [0, 1].
        background: its place among the K.
        scale: factor of the scores in their softmax; None where they are shares of a sum.

    Returns:
        (B, K, H, W).
    """
    if scale is not None:
        probabilities = (scale * scores).softmax(dim=1)
    else:
        tiny = torch.finfo(scores.dtype).tiny
        positive = scores.clamp(min=0)
        probabilities = positive / positive.sum(dim=1, keepdim=True).clamp(min=tiny)
    own = probabilities[:, background]
    others = probabilities.index_fill(1, torch.tensor([background], device=scores.device), 0)
    raised = torch.where(others.amax(dim=1) < threshold, own.clamp(min=threshold), own)
    probabilities[:, background] = raised
    return probabilities
