"""A graph of neighbouring pixels by colour (LPOSS+).

Letters: H W pixels, K vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

RADIUS, COLOUR_SCALE = 6, 0.01
LAB_LENGTH = 100.0  # of L from black to white, which is 1 here
# sRGB to XYZ under D65 (IEC 61966-2-1), and that white.
XYZ_OF_RGB = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)

Window = tuple[slice, slice]


class PixelGraph:
    """The normalised affinity of pixels, applied to vectors without being stored as a matrix.

    A pixel is joined to those at most 6 rows and 6 columns away, with exp(-|D| / 0.01), where D is
    the difference in Lab with L in [0, 1]; the weight is divided by the roots of both pixels' sums.

    Args:
        image: (3, H, W) in [0, 1].
    """

    def __init__(self, image: Tensor) -> None:
        lab = lab_of_rgb(image.float()) / LAB_LENGTH
        self._size = lab.shape[-2:]
        self._weights = [
            (-(lab[:, *there] - lab[:, *here]).norm(dim=0) / COLOUR_SCALE).exp()
            for here, there in _pairs(self._size)
        ]
        degrees = lab.new_zeros(self._size)
        for weights, (here, there) in zip(self._weights, _pairs(self._size), strict=True):
            degrees[here] += weights
            degrees[there] += weights
        tiny = torch.finfo(degrees.dtype).tiny
        scale = torch.where(degrees > 0, degrees.clamp(min=tiny).rsqrt(), 0)
        for weights, (here, there) in zip(self._weights, _pairs(self._size), strict=True):
            weights *= scale[here] * scale[there]

    def apply(self, vectors: Tensor) -> Tensor:
        """Vectors (H W, K) -> the matrix times them."""
        maps = vectors.T.unflatten(1, self._size).contiguous()
        total = torch.zeros_like(maps)
        for weights, (here, there) in zip(self._weights, _pairs(self._size), strict=True):
            total[:, *here].addcmul_(weights, maps[:, *there])
            total[:, *there].addcmul_(weights, maps[:, *here])
        return total.flatten(1).T


def _pairs(size: tuple[int, ...]) -> Iterator[tuple[Window, Window]]:
    """Two windows of a map for every offset, of each and its opposite one, within the radius."""
    height, width = size
    for down in range(min(RADIUS, height - 1) + 1):
        for right in range(-min(RADIUS, width - 1), min(RADIUS, width - 1) + 1):
            if down == 0 and right <= 0:
                continue
            left = max(0, -right)
            columns = width - abs(right)
            here = slice(0, height - down), slice(left, left + columns)
            there = slice(down, height), slice(left + right, left + right + columns)
            yield here, there


def lab_of_rgb(image: Tensor) -> Tensor:
    """sRGB (3, H, W) in [0, 1] -> CIE L*a*b* (3, H, W) under D65, L in [0, 100]."""
    linear = torch.where(
        image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055).clamp(min=0) ** 2.4
    )
    matrix, white = image.new_tensor(XYZ_OF_RGB), image.new_tensor(WHITE)
    relative = torch.einsum("ij,jhw->ihw", matrix, linear) / white[:, None, None]
    root = torch.where(
        relative > (6 / 29) ** 3,
        relative.clamp(min=0) ** (1 / 3),
        relative * (29 / 6) ** 2 / 3 + 4 / 29,
    )
    x, y, z = root
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)))
