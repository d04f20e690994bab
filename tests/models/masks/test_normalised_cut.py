"""Normalised cuts beside a plain reading of them, and where they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import eigh

from pipeline.engine.runtime import Runtime
from pipeline.methods.masks import CutParams, ObjectsParams, SelfMaskParams, load_mask_source
from pipeline.models.masks.eigenvectors import smallest_eigenvectors
from pipeline.models.masks.making import coarse_objects
from pipeline.models.masks.normalised_cut import cut_objects, with_further_objects
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, save_selfmask
from pipeline.params.base import EncoderParams

RULES: dict[str, Any] = {"tau": 0.2, "max_cut": 0.9, "min_area": 0.03}


def blocks(height: int, width: int, *boxes: tuple[int, int, int, int], seed: int) -> torch.Tensor:
    """(16, height, width): each box, and what is around them, has a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    numbers = torch.zeros(height, width, dtype=torch.long)
    for number, (top, left, bottom, right) in enumerate(boxes, 1):
        numbers[top:bottom, left:right] = number
    noise = torch.randn(16, height, width, generator=generator)
    return directions[numbers].permute(2, 0, 1) + 0.15 * noise


def plain_cut(
    features: np.ndarray, left: np.ndarray, tau: float, max_cut: float
) -> np.ndarray | None:
    """One cut, position by position."""
    places = [(row, column) for row, column in np.ndindex(left.shape) if left[row, column]]
    count = len(places)
    if count < 2:
        return None
    affinity = np.empty((count, count))
    for i, first in enumerate(places):
        for j, second in enumerate(places):
            a, b = features[:, *first], features[:, *second]
            cosine = a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b))
            affinity[i, j] = 1.0 if cosine > tau else 1e-5
    degrees = np.diag(affinity.sum(axis=1))
    values, vectors = eigh(degrees - affinity, degrees)
    if values[1] > max_cut:
        return None
    vector = vectors[:, 1]
    core = max(range(count), key=lambda place: abs(vector[place]))
    is_above = vector[core] > vector.mean()
    side = {place for place, value in zip(places, vector, strict=True)
            if (value > vector.mean()) == is_above}  # fmt: skip
    reached, border = {places[core]}, [places[core]]
    while border:
        row, column = border.pop()
        steps = ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1))
        fresh = [step for step in steps if step in side and step not in reached]
        reached.update(fresh)
        border.extend(fresh)
    mask = np.zeros(left.shape, bool)
    for place in reached:
        mask[place] = True
    return mask


def plain_objects(
    features: np.ndarray, left: np.ndarray, count: int, tau: float, max_cut: float, min_area: float
) -> list[np.ndarray]:
    left, objects, specks = left.copy(), [], 0
    while len(objects) < count and specks < 8:
        part = plain_cut(features, left, tau, max_cut)
        if part is None:
            break
        left &= ~part
        if part.sum() / part.size >= min_area:
            objects.append(part)
        else:
            specks += 1
    return objects


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((7, 10), [(1, 1, 4, 4), (2, 6, 6, 9)]),
        ((9, 5), [(1, 1, 3, 4), (5, 1, 8, 3)]),
        ((1, 9), [(0, 2, 1, 5)]),
        ((8, 8), [(1, 1, 3, 3), (1, 5, 3, 8), (5, 1, 8, 4)]),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_cuts_are_those_of_a_plain_reading(
    size: tuple[int, int], boxes: list[tuple[int, int, int, int]], count: int, seed: int
) -> None:
    features = blocks(*size, *boxes, seed=seed)
    taken = np.zeros(size, bool)
    taken[-1, -2:] = True
    found = cut_objects(features, taken, count=count, **RULES)
    expected = plain_objects(features.double().numpy(), ~taken, count, **RULES)
    assert found.shape == (count, *size)
    assert len(expected) >= 1
    for number, mask in enumerate(found):
        wanted = expected[number] if number < len(expected) else np.zeros(size, bool)
        np.testing.assert_array_equal(mask, wanted)
    assert not found[:, taken].any()
    assert (found.sum(axis=0) <= 1).all()


def test_objects_are_found_one_after_the_other() -> None:
    boxes = [(1, 1, 5, 5), (2, 8, 9, 13)]
    found = cut_objects(blocks(10, 15, *boxes, seed=0), count=2, **RULES)
    truths = np.zeros((2, 10, 15), bool)
    for truth, (top, left, bottom, right) in zip(truths, boxes, strict=True):
        truth[top:bottom, left:right] = True
    for truth in truths:
        overlap = [(truth & mask).sum() / (truth | mask).sum() for mask in found]
        assert max(overlap) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 5)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_features_without_contrast_are_one_thing(size: tuple[int, int], value: float) -> None:
    found = cut_objects(torch.full((4, *size), value), count=3, **RULES)
    assert found.shape == (3, *size)
    assert not found.any()


def test_thresholds_end_the_cuts() -> None:
    features = blocks(8, 9, (1, 1, 3, 3), (4, 4, 7, 8), seed=1)
    assert cut_objects(features, count=3, **RULES).any(axis=(1, 2)).sum() >= 2
    assert not cut_objects(features, count=3, **RULES | {"max_cut": 1e-12}).any()
    assert not cut_objects(features, count=3, **RULES | {"min_area": 1.0}).any()
    assert not cut_objects(features, np.ones((8, 9), bool), count=3, **RULES).any()


def test_a_speck_is_left_out_and_the_rest_is_cut() -> None:
    features = blocks(12, 12, (0, 0, 1, 1), (4, 4, 9, 9), seed=2)
    [mask] = cut_objects(features, count=1, **RULES)
    assert mask[4:9, 4:9].all()
    assert mask.sum() == 25


def test_eigenvectors_of_many_positions_solve_the_same_problem() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((60, 60))
    affinity = values + values.T
    degrees = np.diag(affinity.sum(axis=1))
    expected, _ = eigh(degrees - affinity, degrees)
    for max_dense in (1024, 10):
        found, vectors = smallest_eigenvectors(affinity.copy(), 2, max_dense=max_dense)
        np.testing.assert_allclose(found, expected[:2], atol=1e-10)
        np.testing.assert_allclose(
            (degrees - affinity) @ vectors, degrees @ vectors * found, atol=1e-8
        )


def test_what_the_first_object_covers_is_not_cut_again() -> None:
    """At patches of 4 pixels on an image that is no whole number of them."""
    features = blocks(6, 8, (1, 1, 3, 3), (3, 5, 5, 7), seed=3)[None]
    first = torch.zeros(1, 22, 31)
    first[:, 4:12, 4:12] = 0.6
    params = ObjectsParams(source="any", objects=3, min_area=0.03)
    masks = with_further_objects(first, features, patch=4, params=params, seed=0)
    assert masks.shape == (1, 3, 22, 31)
    torch.testing.assert_close(masks[:, 0], first)
    others = masks[0, 1:] > 0.5
    assert others[:, 14:18, 22:26].any(dim=0).all()
    assert not (others.any(dim=0) & (first[0] > 0.5))[5:11, 5:11].any()
    alone = with_further_objects(
        first, features, patch=4, params=params.model_copy(update={"objects": 1}), seed=0
    )
    torch.testing.assert_close(alone, first[:, None])


def test_large_maps_are_cut_on_a_smaller_grid() -> None:
    features = blocks(70, 64, (10, 10, 30, 30), (40, 20, 66, 60), seed=4)[None]
    first = torch.zeros(1, 280, 256)
    first[:, 40:120, 40:120] = 1
    params = ObjectsParams(source="any", objects=2)
    masks = with_further_objects(first, features, patch=4, params=params, seed=0)
    truth = torch.zeros(280, 256, dtype=torch.bool)
    truth[160:264, 80:240] = True
    found = masks[0, 1] > 0.5
    assert (found & truth).sum() / (found | truth).sum() > 0.9


@pytest.mark.parametrize("threshold", [0.1, 0.9])
def test_the_threshold_is_of_the_networks_own_probabilities(threshold: float) -> None:
    """Those of the cut objects only tell where their patches end."""

    class Source:
        def __init__(self) -> None:
            self.settings: dict[str, Any] = {}
            self.max_pixels = 10_000
            self.threshold = threshold

        def predict(self, images: torch.Tensor) -> torch.Tensor:
            return self.predict_objects(images)[:, 0]

        def predict_objects(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linspace(0, 1, images.shape[-1]).expand(1, 2, *images.shape[-2:])

    [[first, second]] = coarse_objects([Image.new("RGB", (11, 2))], source=Source())
    assert first[0].tolist() == [number / 10 > threshold + 1e-6 for number in range(11)]
    assert second[0].tolist() == [number > 5 for number in range(11)]


def images(count: int, height: int, width: int) -> torch.Tensor:
    pixels = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(5)) * 0.1
    for number in range(count):
        pixels[number, 0, 4 + number : 20, 6:22] += 0.8
        pixels[number, 2, 18:30, 24 + number :] += 0.7
    return pixels


@pytest.mark.parametrize("kind", ["cut", "selfmask"])
def test_batches_do_not_show(
    kind: str, encoder: EncoderParams, runtime: Runtime, tmp_path: Path
) -> None:
    if kind == "cut":
        params: ObjectsParams = CutParams(encoder=encoder, objects=3, tau=0.5)
    else:
        torch.manual_seed(0)
        config = SelfMaskConfig(
            dim=16, depth=1, num_heads=2, num_queries=3, decoder_layers=1, mlp_ratio=2, grid=4
        )
        save_selfmask(SelfMask(config), tmp_path / "tiny.safetensors")
        params = SelfMaskParams(weights=tmp_path / "tiny.safetensors", objects=3, tau=0.5)
    source = load_mask_source(params, runtime)
    batch = images(3, 37, 50)
    together = source.predict_objects(batch)  # type: ignore[attr-defined]
    assert together.shape == (3, 3, 37, 50)
    torch.testing.assert_close(source.predict(batch), together[:, 0])
    for image, masks in zip(batch, together, strict=True):
        alone = source.predict_objects(image[None])  # type: ignore[attr-defined]
        torch.testing.assert_close(alone[0], masks)


@pytest.mark.parametrize(("size", "alone"), [(104, 20), (19, 0), (1100, 200)])
def test_positions_that_are_like_no_other_do_not_stop_the_solver(size: int, alone: int) -> None:
    """All eigenvalues but one are equal, of which LAPACK's drivers of subsets may find none."""
    affinity = np.full((size, size), 1e-5)
    affinity[np.arange(alone, size), np.arange(alone, size)] = 1.0
    degrees = np.diag(affinity.sum(axis=1))
    values, vectors = smallest_eigenvectors(affinity.copy(), 2)
    assert vectors.shape == (size, 2)
    np.testing.assert_allclose(
        (degrees - affinity) @ vectors, degrees @ vectors * values, atol=1e-12
    )
