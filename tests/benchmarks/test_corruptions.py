"""The corruptions: each changes pixels by its level and its seed alone, at any size."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmarks.corruptions import CORRUPTIONS, check_corruption, corrupt
from pipeline.errors import PipelineError

LEVELS = (1, 2, 3, 4, 5)
DRAWN = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "spatter")


def scene(width: int = 128, height: int = 80) -> Image.Image:
    """A slope of colours with two sharp objects."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, 255 - columns], axis=-1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = (250, 10, 60)
    pixels[height // 2 :: 6, ::6] = (10, 240, 240)
    return Image.fromarray(pixels.astype(np.uint8))


def distance(image: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two images."""
    return float(np.abs(np.asarray(image, int) - np.asarray(other, int)).mean())


def test_they_are_the_eight_of_the_paper() -> None:
    assert len(set(CORRUPTIONS)) == 8
    kinds = {name.split("_")[-1] for name in CORRUPTIONS}
    assert kinds == {"noise", "blur", "spatter", "compression"}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_higher_level_is_further_from_the_image(name: str) -> None:
    image = scene()
    before = image.tobytes()
    corrupted = [corrupt(image, name=name, level=level, seed=3) for level in LEVELS]
    assert all((other.mode, other.size) == ("RGB", image.size) for other in corrupted)
    distances = [distance(image, other) for other in corrupted]
    assert distances[0] > 0
    assert distances == sorted(set(distances))
    assert image.tobytes() == before


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides_what_is_drawn(name: str) -> None:
    image = scene()
    first, again, other = (
        corrupt(image, name=name, level=4, seed=seed).tobytes() for seed in (7, 7, 2**63 - 1)
    )
    assert first == again
    assert (first == other) == (name not in DRAWN)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_bgr_is_what_the_library_makes_of_exchanged_channels(name: str) -> None:
    image = scene()
    exchanged = Image.fromarray(np.asarray(image)[..., ::-1])
    expected = np.asarray(corrupt(exchanged, name=name, level=5, seed=3))[..., ::-1]
    found = corrupt(image, name=name, level=5, seed=3, channels="bgr")
    np.testing.assert_array_equal(np.asarray(found), expected)
    is_same = found.tobytes() == corrupt(image, name=name, level=5, seed=3).tobytes()
    assert is_same is name.endswith("blur")


def test_mud_is_brown_in_rgb_and_blue_in_bgr() -> None:
    black = Image.new("RGB", (200, 200))
    for channels, colour in (("rgb", [63, 42, 20]), ("bgr", [20, 42, 63])):
        muddy = corrupt(black, name="spatter", level=5, seed=1, channels=channels)
        assert np.asarray(muddy).max(axis=(0, 1)).tolist() == pytest.approx(colour, abs=1)


def test_noise_has_the_deviation_of_imagenet_c() -> None:
    grey = Image.new("RGB", (256, 256), (128, 128, 128))
    noisy = np.asarray(corrupt(grey, name="gaussian_noise", level=1, seed=0), float)
    assert noisy.std() == pytest.approx(0.08 * 255, rel=0.02)


def test_jpeg_has_the_quality_of_imagenet_c() -> None:
    buffer = io.BytesIO()
    scene().save(buffer, "JPEG", quality=7)
    expected = np.asarray(Image.open(buffer))
    found = np.asarray(corrupt(scene(), name="jpeg_compression", level=5, seed=0))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(1, 1), (2, 40), (50, 5), (31, 33)])
def test_any_size_is_taken(name: str, size: tuple[int, int]) -> None:
    corrupted = corrupt(scene(*size), name=name, level=5, seed=0)
    assert (corrupted.mode, corrupted.size) == ("RGB", size)


def test_a_small_side_is_extended_by_reflection() -> None:
    strip = scene(64, 16)
    mirrored = np.concatenate([np.asarray(strip), np.asarray(strip)[::-1]])
    whole = corrupt(Image.fromarray(mirrored), name="gaussian_blur", level=2, seed=0)
    found = corrupt(strip, name="gaussian_blur", level=2, seed=0)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(whole)[:16])


def test_an_image_that_no_drop_hits_stays_as_it_is() -> None:
    image = scene(32, 32)
    spattered = [corrupt(image, name="spatter", level=1, seed=seed) for seed in range(40)]
    distances = [distance(image, other) for other in spattered]
    assert min(distances) == 0
    assert 0 < max(distances) < 60  # none turns black


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.random(4)
    np.random.seed(5)
    for name in CORRUPTIONS:
        corrupt(scene(40, 40), name=name, level=2, seed=1)
    np.testing.assert_array_equal(np.random.random(4), expected)


def test_threads_do_not_disturb_each_other() -> None:
    image = scene(200, 150)

    def run(seed: int) -> bytes:
        return corrupt(image, name="speckle_noise", level=3, seed=seed).tobytes()

    expected = [run(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(12))) == expected


def test_a_name_or_level_that_is_not_known_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"'fog' is not known; choose one of gaussian_noise, "):
        corrupt(scene(), name="fog", level=1, seed=0)
    for level in (0, 6):
        with pytest.raises(PipelineError, match=rf"spatter: level {level} is not one of 1, 2"):
            check_corruption("spatter", level)


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(PipelineError, match=r"-e '\.\[corruptions\]'"):
        corrupt(scene(), name="spatter", level=1, seed=0)
