"""Regions of label maps as scored objects, by hand and by a plain reading at every pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from pipeline.formats.predictions import Instance
from pipeline.models.dense.objects import objects_of_labels

TEXT = torch.eye(3)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def grid(vectors: list[list[list[float]]]) -> torch.Tensor:
    """Features (C, h, w) from rows of vectors."""
    return torch.tensor(vectors, dtype=torch.float32).permute(2, 0, 1)


def test_a_score_by_hand() -> None:
    """A patch a pixel: cat at two pixels, dog at one, none of them of unit length."""
    labels = np.array([[0, 1, 1, 2]], np.int16)
    confidence = np.array([[0.9, 0.5, 0.7, 1.0]], np.float32)
    features = grid([[[1, 0, 0], [0, 2, 0], [0, 0, 7], [3, 0, 4]]])
    dog, cat = objects_of_labels(labels, confidence, features, TEXT)
    # Cat: the mean of (0, 1, 0) and (0, 0, 1), whose cosine with its text is 1 / sqrt 2.
    assert (dog.label_id, cat.label_id) == (2, 1)
    assert cat.score == pytest.approx(0.6 * sigmoid(5 / math.sqrt(2)), rel=1e-5)
    assert dog.score == pytest.approx(1.0 * sigmoid(5 * 0.8), rel=1e-5)
    np.testing.assert_array_equal(cat.mask, labels == 1)
    assert (cat.bbox_xyxy, cat.size) == ((1, 0, 2, 0), (1, 4))
    (_, warm) = objects_of_labels(labels, confidence, features, TEXT, temperature=1.0)
    assert warm.score == pytest.approx(0.6 * sigmoid(1 / math.sqrt(2)), rel=1e-5)


def test_parts_are_connected_by_their_sides() -> None:
    labels = np.array([[1, 0, 2, 2], [0, 1, 2, 0], [0, 1, 0, 2]], np.int16)
    ones = np.ones(labels.shape, np.float32)
    features = grid([[[0.0, 1.0, 1.0]] * 4] * 3)
    whole = objects_of_labels(labels, ones, features, TEXT)
    parts = objects_of_labels(labels, ones, features, TEXT, regions="components")
    assert [(item.label_id, int(item.mask.sum())) for item in whole] == [(1, 3), (2, 4)]
    counts = [(item.label_id, int(item.mask.sum())) for item in parts]
    assert counts == [(1, 1), (1, 2), (2, 3), (2, 1)]
    assert [item.bbox_xyxy for item in parts][1] == (1, 1, 1, 2)


def test_background_alone_has_no_objects() -> None:
    for size in ((1, 1), (3, 5)):
        labels = np.zeros(size, np.int16)
        ones = np.ones(size, np.float32)
        for regions in ("classes", "components"):
            assert objects_of_labels(labels, ones, torch.ones(3, 2, 2), TEXT, regions=regions) == []


def test_one_pixel_and_many_categories() -> None:
    labels = np.array([[919]], np.int16)
    text = F.normalize(torch.randn(920, 4, generator=torch.Generator().manual_seed(0)))
    features = text[919].view(4, 1, 1).expand(4, 2, 3)
    (found,) = objects_of_labels(labels, np.full((1, 1), 0.25, np.float32), features, text)
    assert found.label_id == 919
    assert found.score == pytest.approx(0.25 * sigmoid(5), rel=1e-5)
    assert found.mask.tolist() == [[True]]


def plain(
    labels: np.ndarray, confidence: np.ndarray, features: torch.Tensor, *, split: bool
) -> list[tuple[int, float, np.ndarray]]:
    """The same at every pixel."""
    unit = features / features.norm(dim=0)
    pixels = F.interpolate(unit[None], size=labels.shape, mode="bilinear")[0]
    found = []
    for label_id in np.unique(labels[labels > 0]):
        masks = [labels == label_id]
        if split:
            parts, count = ndimage.label(masks[0])
            masks = [parts == number + 1 for number in range(count)]
        for mask in masks:
            mean = pixels[:, torch.from_numpy(mask)].mean(dim=1)
            cosine = float(mean @ TEXT[label_id] / mean.norm())
            found.append(
                (int(label_id), float(confidence[mask].mean()) * sigmoid(5 * cosine), mask)
            )
    return found


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", [(13, 20), (40, 7), (2, 3)])
def test_against_upsampled_features(size: tuple[int, int], split: bool) -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, size).astype(np.int16)
    confidence = random.random(size, np.float32)
    features = torch.from_numpy(random.normal(size=(3, 4, 5)).astype(np.float32))
    regions = "components" if split else "classes"
    found = objects_of_labels(labels, confidence, features, TEXT, regions=regions)
    expected = plain(labels, confidence, features, split=split)
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)

    def key(item: Instance) -> tuple[int, bytes]:
        return item.label_id, item.mask.tobytes()

    expected_scores = {(label_id, mask.tobytes()): score for label_id, score, mask in expected}
    assert {key(item) for item in found} == expected_scores.keys()
    for item in found:
        assert item.score == pytest.approx(expected_scores[key(item)], rel=1e-4)
