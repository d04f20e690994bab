from __future__ import annotations

import numpy as np
import pytest

from pipeline.formats.labels import IGNORE_INDEX, decode_confidence, encode_confidence
from pipeline.training.targets import saliency_target, training_target

X = IGNORE_INDEX
# Category 2. Columns: DenseCLIP sees background, the category, another (3), and each again unsure.
MASK = np.array([[True] * 6, [False] * 6])
DENSE = np.array([[0, 2, 3, 0, 2, 3], [0, 2, 3, 0, 2, 3]])
CONFIDENCE = np.array([[0.9, 0.9, 0.9, 0.4, 0.4, 0.4]] * 2, dtype=np.float32)


def test_saliency_is_the_pseudo_mask() -> None:
    target = training_target(MASK, 2, DENSE, CONFIDENCE, target="saliency")
    assert target.dtype == np.int16
    assert target.tolist() == [[2] * 6, [0] * 6]


@pytest.mark.parametrize("label_id", [0, 1, 255, 256, 65_536])
def test_saliency_alone_has_room_for_its_label_id(label_id: int) -> None:
    labels = saliency_target(MASK, label_id)
    assert labels.tolist() == [[label_id] * 6, [0] * 6]
    assert (labels.dtype == np.uint8) == (label_id < 256)


def test_denseclip_is_the_dense_labels_alone() -> None:
    target = training_target(MASK, 2, DENSE, CONFIDENCE, target="denseclip")
    assert target.dtype == np.int16
    assert target.tolist() == DENSE.tolist()


@pytest.mark.parametrize(("conflict", "other"), [("category", 3), ("ignore", X)])
def test_fused_lets_a_confident_denseclip_overrule(conflict: str, other: int) -> None:
    target = training_target(MASK, 2, DENSE, CONFIDENCE, target="fused", conflict=conflict)
    assert target.tolist() == [[2, 2, other, 2, 2, 2], [0, X, 0, 0, 0, 0]]


def test_confidence_equal_to_the_threshold_counts() -> None:
    confidence = np.full((1, 2), 0.5)
    mask, dense = np.array([[True, False]]), np.array([[3, 2]])
    at, above = (
        training_target(mask, 2, dense, confidence, target="fused", confidence_threshold=t).tolist()
        for t in (0.5, 0.51)
    )
    assert at == [[X, X]]
    assert above == [[2, 0]]


def test_negatives_are_background_unless_a_category_is_seen() -> None:
    target = training_target(MASK, 0, DENSE, CONFIDENCE, target="fused", conflict="category")
    assert target.tolist() == [[0, 2, 3, 0, 0, 0], [0] * 6]
    assert not training_target(MASK, 0, DENSE, CONFIDENCE, target="saliency").any()


@pytest.mark.parametrize("kind", ["saliency", "denseclip", "fused"])
def test_inputs_stay_and_one_pixel_works(kind: str) -> None:
    mask, dense = np.array([[True]]), np.array([[3]], dtype=np.int16)
    target = training_target(mask, 2, dense, np.ones((1, 1)), target=kind, conflict="category")
    target += 10
    assert target.shape == (1, 1)
    assert dense.tolist() == [[3]]
    assert mask.tolist() == [[True]]


def test_maps_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(1, 6\)"):
        training_target(MASK, 2, DENSE[:1], CONFIDENCE, target="fused")


def test_confidence_survives_eight_bits_to_half_a_level() -> None:
    confidence = np.linspace(0, 1, 1001).reshape(7, 143)
    levels = encode_confidence(confidence)
    assert levels.dtype == np.uint8
    assert np.abs(decode_confidence(levels) - confidence).max() <= 0.5 / 255 + 1e-6
    assert encode_confidence(np.array([[-0.1, 1.1]])).tolist() == [[0, 255]]
