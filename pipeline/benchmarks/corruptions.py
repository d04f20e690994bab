"""Damaged images: the eight corruptions under which DenseCLIP reports its robustness.

DenseCLIP section 4.5 and Table 4, with the operators and coefficients of ImageNet-C at levels 1 to
5. The library that keeps them, `imagecorruptions-imaug`, is imported at the first call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import PipelineError

# In the order of the paper's table; the names are those of ImageNet-C.
CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "gaussian_blur",
    "defocus_blur",
    "spatter",
    "jpeg_compression",
)
LEVELS = range(1, 6)
MIN_SIDE = 32  # the library takes no smaller image
TAKES_SEED = ("impulse_noise",)  # it has a generator of its own; the others use NumPy's global one
NUM_SEEDS = 2**32

_generator_lock = threading.Lock()


def corrupt(image: Image.Image, *, name: str, level: int, seed: int) -> Image.Image:
    """Corrupt an image; the same arguments give the same pixels, in any thread or process.

    Noise and spatter are drawn for `seed`: give every image a seed of its own. NumPy's global
    generator, which the library uses, is as before afterwards. Sides below 32 pixels are extended
    by reflection for the library and cut off again.

    Args:
        image: RGB, of any size.
        name: one of `CORRUPTIONS`.
        level: severity from 1 (slight) to 5.
        seed: any integer of at least 0.

    Returns:
        RGB of the same size. A black or a plain image may come back unchanged: blur, JPEG and
        noise that is proportional to brightness leave it as it is.

    Raises:
        PipelineError: unknown name, level outside 1..5, or the library is not installed.
    """
    check_corruption(name, level)
    library_corrupt = _load_library()
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    padding = [(0, max(0, MIN_SIDE - side)) for side in (height, width)]
    padded = np.pad(pixels, [*padding, (0, 0)], mode="symmetric")
    options = {"seed": seed % NUM_SEEDS} if name in TAKES_SEED else {}
    # Where no drop of spatter falls, possible in tiny images, the library divides zero by zero.
    with _seeded_globally(seed % NUM_SEEDS), np.errstate(invalid="raise"):
        try:
            corrupted = library_corrupt(padded, severity=level, corruption_name=name, **options)
        except FloatingPointError:
            return image.copy()
    return Image.fromarray(np.ascontiguousarray(corrupted[:height, :width]))


def check_corruption(name: str, level: int) -> None:
    """Refuse a corruption that `corrupt` does not know.

    Raises:
        PipelineError: unknown name or level outside 1..5.
    """
    if name not in CORRUPTIONS:
        raise PipelineError(
            f"corruption: {name!r} is not known; choose one of {', '.join(CORRUPTIONS)}"
        )
    if level not in LEVELS:
        raise PipelineError(f"corruption {name}: level {level!r} is not one of 1, 2, 3, 4, 5")


def _load_library() -> Callable[..., Any]:
    try:
        from imagecorruptions import corrupt as library_corrupt
    except ImportError as error:
        raise PipelineError(
            f"corruption: the library cannot be imported ({error}); install it with "
            "`pip install 'zutis-pipeline[corruptions]'`; where libGL is what is missing, with "
            "`pip install --force-reinstall --no-deps opencv-python-headless`"
        ) from None
    return library_corrupt


@contextmanager
def _seeded_globally(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator for the block, one thread at a time, and restore it."""
    with _generator_lock:
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)
