"""Pictures as responses: made on demand, kept in a cache of bounded size."""

from __future__ import annotations

import html
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from starlette.responses import Response

from pipeline.formats.images import ImageError, encode_jpeg, encode_png
from pipeline.pictures.report import enlarge_image, fit_image

THUMB_SIDE, LARGE_SIDE = 256, 1024
CACHE_BYTES = 64 * 2**20
QUALITY = 85
SCALE = np.array([[247, 247, 250], [49, 104, 172], [8, 24, 66]], dtype=np.float32)

# The address names the version, so that a browser need not ask again.
KEPT = {"Cache-Control": "private, max-age=86400, immutable"}


class PictureCache:
    """The most recently used pictures, up to a number of bytes in all."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What is held now."""
        return self._num_bytes

    def get(self, address: str, make: Callable[[], bytes]) -> bytes:
        """The picture of an address, made if it is not there."""
        with self._lock:
            if address in self._kept:
                self._kept.move_to_end(address)
                return self._kept[address]
        data = make()
        with self._lock:
            if address not in self._kept:
                self._kept[address] = data
                self._num_bytes += len(data)
            while self._num_bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self._num_bytes -= len(oldest)
        return data


def picture_response(make: Callable[[], bytes]) -> Response:
    """A JPEG or PNG file, or a picture that says why there is none."""
    try:
        data = make()
    except ImageError as error:
        return Response(_placeholder(str(error)), 404, media_type="image/svg+xml")
    kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
    return Response(data, media_type=kind, headers=KEPT)


def thumbnail(image: Image.Image, side: int = THUMB_SIDE) -> bytes:
    """JPEG file of an image whose long side is about `side` pixels; tiny ones are enlarged."""
    return encode_jpeg(enlarge_image(fit_image(image, side), side), quality=QUALITY)


def sharp(pixels: NDArray[np.uint8], side: int) -> bytes:
    """PNG file of a map of few colours, as `thumbnail`."""
    return encode_png(np.asarray(enlarge_image(fit_image(Image.fromarray(pixels), side), side)))


def draw_confidence(probability: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours (H, W, 3) of probabilities (H, W) in [0, 1]: near white, blue, near black."""
    place = np.clip(probability, 0, 1)[..., None].astype(np.float32) * (len(SCALE) - 1)
    lower = np.minimum(place.astype(int), len(SCALE) - 2)
    start, end = SCALE[lower[..., 0]], SCALE[lower[..., 0] + 1]
    return np.asarray((start + (place - lower) * (end - start)).round(), dtype=np.uint8)


def _placeholder(reason: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256" width="256" height="256">'
        '<rect width="256" height="256" fill="#e9ebee"/>'
        '<text x="128" y="132" text-anchor="middle" font-family="sans-serif" font-size="15" '
        f'fill="#4a5058">{html.escape(reason[:30])}</text></svg>'
    )
