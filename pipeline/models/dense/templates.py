"""Prompt templates chosen without labels, and their experts (FLOSS, Benigmim et al., 2025).

Each template makes a classifier of its own. A label's templates are those whose classifier is most
certain, by entropy, of the places that it gives to the label; their mean is the label's expert.
Letters: T templates, K label ids, C joint embedding, B images, h w grid of patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.dense.labels import label_and_confidence
from pipeline.models.weights.weights import hash_tensors

if TYPE_CHECKING:
    from pipeline.methods.dense import TextLabeller

ROWS_AT_ONCE = 1024  # of text, that a labeller compares with an image in one pass
PIXELS_AT_ONCE = 2**24  # of scores in one pass, where these are of pixels


class TemplateExperts:
    """A labeller in which an expert for each label id has its say, see `DenseLabeller`.

    At a position the most confident of the experts that name their own label wins, and the scores
    are its probabilities; where none does, they are those of `labeller` itself.

    Args:
        labeller: with the mean of all templates; its scores are cosines.
        experts: (K, K, C) unit rows: the classifier of each label's expert.
    """

    logit_scale = None

    def __init__(self, labeller: TextLabeller, experts: Tensor) -> None:
        self._labeller = labeller
        self._experts = experts
        self.patch_size = labeller.patch_size
        self.text = labeller.text
        hasher = hashlib.sha256()
        hash_tensors(hasher, {"experts": experts})
        self._hash = hasher.hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the labeller; the experts are in their hash."""
        return {**self._labeller.settings, "experts": self._hash}

    def select(self, label_ids: Sequence[int]) -> TemplateExperts:
        """The same for some label ids, in this order."""
        chosen = list(label_ids)
        return TemplateExperts(self._labeller.select(chosen), self._experts[chosen][:, chosen])

    def scores(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> probabilities (B, K, h, w), float32."""
        return self.scores_and_features(images)[0]

    def features(self, images: Tensor) -> Tensor:
        """The labeller's features (B, C, h, w)."""
        return self._labeller.features(images)

    @torch.no_grad()
    def scores_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, K, h, w), and the labeller's features (B, C, h, w)."""
        scores, features = self._labeller.scores_and_features(images)
        scale = self._labeller.logit_scale or 1.0
        fused = (scale * scores).softmax(dim=1)
        most = torch.zeros_like(fused[:, :1])
        for number, said in enumerate(_classified(self._labeller, self._experts, images)):
            probabilities = (scale * said).softmax(dim=1)
            confidence, named = probabilities.max(dim=1, keepdim=True)
            wins = (named == number) & (confidence > most)
            fused = torch.where(wins, probabilities, fused)
            most = torch.where(wins, confidence, most)
        return fused, features

    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> label ids (B, H, W) int64, confidence (B, H, W)."""
        height, width = images.shape[-2:]
        return label_and_confidence(self.scores(images), (height, width), scale=None)


def choose_templates(
    labeller: TextLabeller, classifiers: Tensor, images: Iterable[Tensor], *, keep: int
) -> list[list[int]]:
    """The templates of each label id.

    Args:
        labeller: whose scores are cosines.
        classifiers: (T, K, C) unit rows: the text of every template.
        images: (1, 3, H, W) in [0, 1], unlabelled, on the labeller's device.
        keep: number of templates a label.

    Returns:
        For each label id, the numbers of the `keep` templates of the lowest mean entropy over the
        positions that they give to the label; of equals the first. All that give it any, where
        these are fewer, and all templates where none does.
    """
    num_templates, num_labels = classifiers.shape[:2]
    entropy = torch.zeros(num_templates, num_labels, dtype=torch.float64)
    count = torch.zeros(num_templates, num_labels, dtype=torch.float64)
    scale = labeller.logit_scale or 1.0
    for image in images:
        for number, said in enumerate(_classified(labeller, classifiers, image)):
            logs = (scale * said).log_softmax(dim=1)
            named = logs.argmax(dim=1).flatten().cpu()
            entropies = -(logs.exp() * logs).sum(dim=1).flatten().cpu().double()
            entropy[number].index_add_(0, named, entropies)
            count[number] += named.bincount(minlength=num_labels)
    means = torch.where(count > 0, entropy / count, torch.inf)
    found = [means[:, label].sort(stable=True) for label in range(num_labels)]
    chosen = [order[values < torch.inf][:keep].tolist() for values, order in found]
    return [templates or list(range(num_templates)) for templates in chosen]


def expert_classifiers(classifiers: Tensor, chosen: Sequence[Sequence[int]]) -> Tensor:
    """Unit rows (K, K, C): for each label id the mean of the classifiers (T, K, C) of its own."""
    means = [classifiers[list(templates)].mean(dim=0) for templates in chosen]
    return F.normalize(torch.stack(means), dim=-1)


@torch.no_grad()
def _classified(labeller: TextLabeller, classifiers: Tensor, images: Tensor) -> Iterator[Tensor]:
    """Scores (B, K, h, w) by each of several classifiers (N, K, C), many in one pass."""
    num_labels = classifiers.shape[1]
    rows = ROWS_AT_ONCE
    if labeller.gives_pixels:
        rows = PIXELS_AT_ONCE // images[:, 0].numel()
    for part in classifiers.split(max(1, rows // num_labels)):
        yield from labeller.with_text(part.flatten(0, 1)).scores(images).split(num_labels, dim=1)
