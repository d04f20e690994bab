"""The bilateral solver on hand-made images, and on images at the edge of its domain."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.models.masks.bilateral import bilateral_grid, bilateral_solve


def test_a_boolean_target_is_the_same_as_zeros_and_ones() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (18, 25, 3), np.uint8)
    coarse = rng.integers(0, 2, (18, 25), np.uint8)
    np.testing.assert_array_equal(
        bilateral_solve(image, coarse), bilateral_solve(image, coarse.astype(bool))
    )


def test_vertices_are_neighbours_only_one_step_apart() -> None:
    image = np.zeros((1, 40, 3), np.uint8)  # cells x = 0, 1, 2, 3, all of one colour
    grid = bilateral_grid(image, sigma_spatial=10, sigma_luma=16, sigma_chroma=8)
    expected = 10 * np.eye(4) + np.eye(4, k=1) + np.eye(4, k=-1)
    np.testing.assert_array_equal(grid.blur.toarray(), expected)
    np.testing.assert_array_equal(grid.pixel_counts, [10, 10, 10, 10])
    np.testing.assert_array_equal(grid.vertex_of_pixel[0], np.arange(40) // 10)


def test_a_wide_image_does_not_wrap_around() -> None:
    # The last cell of a row and the first of the next are no neighbours, and none is merged.
    image = np.zeros((2, 600, 3), np.uint8)
    grid = bilateral_grid(image, sigma_spatial=1, sigma_luma=16, sigma_chroma=8)
    assert grid.pixel_counts.shape == (1200,)
    index = grid.vertex_of_pixel
    row = grid.blur.toarray()[index[1, 0]]
    assert set(np.flatnonzero(row)) == {index[1, 0], index[0, 0], index[1, 1]}


def test_all_greys_share_the_cell_of_neutral_chroma() -> None:
    greys = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    grid = bilateral_grid(greys, sigma_spatial=1000, sigma_luma=1000, sigma_chroma=8)
    assert grid.pixel_counts.tolist() == [256]


@pytest.mark.parametrize("value", [0, 1])
def test_one_pixel_keeps_its_value(value: int) -> None:
    image = np.full((1, 1, 3), 7, np.uint8)
    assert bilateral_solve(image, np.array([[value]])) == pytest.approx(value)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_target_stays_constant(value: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    refined = bilateral_solve(image, np.full((20, 31), value))
    np.testing.assert_allclose(refined, value, atol=1e-3)


def test_a_constant_image_averages_within_a_cell() -> None:
    image = np.full((16, 16, 3), 90, np.uint8)
    target = np.zeros((16, 16))
    target[:4] = 1
    np.testing.assert_allclose(bilateral_solve(image, target), 0.25)


def test_a_mask_snaps_to_the_object() -> None:
    image = np.full((64, 64, 3), (30, 60, 200), np.uint8)
    truth = np.zeros((64, 64), bool)
    truth[16:48, 20:44] = True
    image[truth] = (220, 160, 30)
    coarse = np.roll(truth, (3, -3), axis=(0, 1))
    np.testing.assert_array_equal(bilateral_solve(image, coarse) > 0.5, truth)


@pytest.mark.parametrize(
    ("image", "target", "message"),
    [
        (np.zeros((4, 5, 3)), np.zeros((4, 5)), "float64"),
        (np.zeros((4, 5), np.uint8), np.zeros((4, 5)), "uint8 image, got uint8 \\(4, 5\\)"),
        (np.zeros((0, 5, 3), np.uint8), np.zeros((0, 5)), "got uint8 \\(0, 5, 3\\)"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4)), "differ in size"),
    ],
)
def test_wrong_arguments_are_named(image: np.ndarray, target: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bilateral_solve(image, target)


def test_sigmas_must_be_positive() -> None:
    with pytest.raises(ValueError, match="sigmas must be positive, got 16, 0, 8"):
        bilateral_solve(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), sigma_luma=0)


def test_more_steps_converge_beyond_the_published_ones() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 64)[None, :, None] + np.linspace(0, 40, 48)[:, None, None]
    image = (ramp + rng.integers(0, 16, (48, 64, 3))).astype(np.uint8)
    coarse = np.zeros((48, 64))
    coarse[10:30, 12:40] = 1
    sigmas = {"sigma_spatial": 4, "sigma_luma": 4, "sigma_chroma": 4}
    published = bilateral_solve(image, coarse, **sigmas)
    np.testing.assert_array_equal(bilateral_solve(image, coarse, **sigmas, max_steps=25), published)
    first, converged, beyond = (
        bilateral_solve(image, coarse, **sigmas, max_steps=steps) for steps in (1, 500, 5000)
    )
    np.testing.assert_array_equal(converged, beyond)
    assert 1e-4 < np.abs(published - converged).max() < np.abs(first - converged).max()


def test_half_the_size_refines_almost_alike() -> None:
    """A square drawn a little too large shrinks to the square that the image shows."""
    image = np.full((96, 128, 3), 40, dtype=np.uint8)
    image[30:70, 40:90] = (220, 180, 60)
    coarse = np.zeros((96, 128), dtype=bool)
    coarse[26:74, 36:94] = True
    exact = bilateral_solve(image, coarse) > 0.5
    half = bilateral_solve(image, coarse, scale=0.5)
    assert half.shape == exact.shape
    assert ((half > 0.5) == exact).mean() > 0.95


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2)])
def test_a_scale_leaves_at_least_one_pixel(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), dtype=np.uint8)
    assert bilateral_solve(image, np.ones(size, bool), scale=0.1).shape == size
