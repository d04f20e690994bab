"""Upsampling with NumPy beside torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.models.dense.labels import probability
from pipeline.models.layers import interpolate
from pipeline.models.layers.bilinear import upsample, upsampled_labels, upsampled_probability

SIZES = [(1, 1), (3, 5), (12, 12), (40, 7), (375, 500)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (24, 31)])
def test_maps_are_torchs(
    grid: tuple[int, int], size: tuple[int, int], rng: np.random.Generator
) -> None:
    maps = rng.standard_normal((3, *grid), dtype=np.float32)
    wanted = interpolate.upsample(torch.from_numpy(maps)[None], size)[0].numpy()
    np.testing.assert_allclose(upsample(maps, size), wanted, atol=1e-5)


def test_labels_go_through_other_sizes_and_the_first_of_equals_wins(
    rng: np.random.Generator,
) -> None:
    scores = rng.standard_normal((5, 6, 7), dtype=np.float32)
    scores[3] = scores[1]
    sizes = [(50, 60), (33, 41)]
    wanted = interpolate.upsampled_labels(torch.from_numpy(scores)[None], *sizes)[0].numpy()
    found = upsampled_labels(scores, *sizes)
    assert (found == wanted).mean() > 0.999
    assert set(np.unique(found)) == {0, 1, 2, 4}


@pytest.mark.parametrize("scale", [1.0, 20.0, 1e6])
def test_probabilities_are_torchs(scale: float, rng: np.random.Generator) -> None:
    scores = rng.standard_normal((4, 6, 7), dtype=np.float32)
    wanted = probability(torch.from_numpy(scores)[None], 2, (30, 20), scale=scale)[0].numpy()
    np.testing.assert_allclose(
        upsampled_probability(scores, 2, (30, 20), scale=scale), wanted, atol=1e-4
    )
