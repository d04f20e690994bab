"""Damaged images: the eight corruptions under which DenseCLIP reports its robustness.

DenseCLIP section 4.5 and Table 4, with the operators and coefficients of ImageNet-C at levels 1 to
5. The library that keeps them, `imagecorruptions-imaug`, is imported at the first call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from PIL import Image

from pipeline.errors import PipelineError, install_command
from pipeline.files import digest
from pipeline.formats.images import load_image, read_file

if TYPE_CHECKING:
    from pipeline.params.benches import CorruptionParams

Channels = Literal["rgb", "bgr"]

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
SEED_DIGITS = 8  # hexadecimal: 32 bits

_generator_lock = threading.Lock()


def corrupt(
    image: Image.Image, *, name: str, level: int, seed: int, channels: Channels = "rgb"
) -> Image.Image:
    """Corrupt an image; the same arguments give the same pixels, in any thread or process.

    Noise and spatter are drawn for `seed`: give every image a seed of its own. NumPy's global
    generator, which the library uses, is as before afterwards. Sides below 32 pixels are extended
    by reflection for the library and cut off again.

    Args:
        image: RGB, of any size.
        name: one of `CORRUPTIONS`.
        level: severity from 1 (slight) to 5.
        seed: any integer of at least 0.
        channels: their order in what the library sees, which takes them for RGB. Under `bgr`, as
            in DenseCLIP's code, it splashes water and mud with red and blue exchanged, weighs blue
            as red in JPEG's luma, and draws blue's noise first; blurs are the same.

    Returns:
        RGB of the same size. A black or a plain image may come back unchanged: blur, JPEG and
        noise that is proportional to brightness leave it as it is.

    Raises:
        PipelineError: unknown name, level outside 1..5, or the library is not installed.
    """
    check_corruption(name, level)
    library_corrupt = _load_library()
    order = slice(None, None, -1 if channels == "bgr" else 1)
    pixels = np.asarray(image)[..., order]
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
    return Image.fromarray(np.ascontiguousarray(corrupted[:height, :width, order]))


def check_corruption(name: str, level: int, *, field: str = "corruption") -> None:
    """Refuse a corruption that `corrupt` does not know; `field` is where it was written.

    Raises:
        PipelineError: unknown name or level outside 1..5.
    """
    if name not in CORRUPTIONS:
        raise PipelineError(
            f"{field}: {name!r} is not known; choose one of {', '.join(CORRUPTIONS)}"
        )
    if level not in LEVELS:
        raise PipelineError(f"{field}: {name}: level {level!r} is not one of 1, 2, 3, 4, 5")


def _load_library() -> Callable[..., Any]:
    try:
        from imagecorruptions import corrupt as library_corrupt
    except ImportError as error:
        raise PipelineError(
            f"corruption: the library cannot be imported ({error}); install it with "
            f"`{install_command('corruptions')}`; where libGL is what is missing, with "
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


class BenchImage(Protocol):
    """An image of a benchmark."""

    @property
    def image_id(self) -> str: ...
    @property
    def image_path(self) -> Path: ...


class BenchImageReader:
    """Reads images of a benchmark as a predictor sees them, corrupted in every order alike.

    Args:
        corruption: name and level, or None.
        channels: see `corrupt`.
        bench_name: of the benchmark.
        seed: of the corruptions.

    Raises:
        PipelineError: an unknown corruption.
    """

    def __init__(
        self,
        corruption: CorruptionParams | None,
        *,
        channels: Channels = "rgb",
        bench_name: str,
        seed: int,
    ) -> None:
        if corruption is not None:
            field = f"benches.{bench_name}.corruption.name"
            check_corruption(corruption.name, corruption.level, field=field)
        self._corruption = corruption
        self._channels = channels
        self._seed = seed

    def __call__(self, image: BenchImage) -> Image.Image:
        """The RGB image.

        Raises:
            ImageError: it cannot be read.
        """
        return self.decode(image, self.read(image))

    def read(self, image: BenchImage) -> bytes:
        """The content of its file."""
        return read_file(image.image_path)

    def decode(self, image: BenchImage, data: bytes) -> Image.Image:
        """The RGB image of that content, as stored: masks were drawn without EXIF rotation."""
        pixels = load_image(data, upright=False)
        if self._corruption is None:
            return pixels
        name, level = self._corruption.name, self._corruption.level
        seed = self._image_seed(image)
        return corrupt(pixels, name=name, level=level, seed=seed, channels=self._channels)

    def tag(self, image: BenchImage) -> str | None:
        """What a corruption does to an image, None without one."""
        if self._corruption is None:
            return None
        order = " bgr" if self._channels == "bgr" else ""
        return f"{self._corruption.name} {self._corruption.level}{order} {self._image_seed(image)}"

    def _image_seed(self, image: BenchImage) -> int:
        return int(digest([self._seed, image.image_id])[:SEED_DIGITS], 16)
