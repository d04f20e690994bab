"""Sliding windows: an image seen in parts, whose maps are averaged where the parts overlap.

Letters: B images, H W pixels of an image, S T of a window, C channels of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.clip import Windows
from pipeline.models.layers.interpolate import upsample

if TYPE_CHECKING:
    from pipeline.methods.dense import WindowParams

WINDOWS_AT_ONCE = 16  # windows that a network sees together
CHANNELS_AT_ONCE = 64  # of features, whose map of all pixels would be large

Place = tuple[int, int]


def cut_windows(images: Tensor, windows: WindowParams | None) -> tuple[list[Place], list[Tensor]]:
    """Windows of images (B, 3, H, W), row after row.

    Args:
        images: of one size.
        windows: their side, cut to the image's, and stride; None for one, the whole image.

    Returns:
        (top, left) of every window, and its pixels (B, 3, S, T), all of one size.
    """
    height, width = images.shape[-2:]
    side, stride = (windows.side, windows.stride) if windows else (max(height, width), 1)
    starts = Windows(side, stride).starts
    places = list(product(starts(height), starts(width)))
    crops = [images[..., top : top + side, left : left + side] for top, left in places]
    return places, crops


def over_windows(
    see: Callable[[Tensor], Sequence[Tensor]], crops: Sequence[Tensor]
) -> list[list[Tensor]]:
    """What a network gives for every window, several of them at once.

    Args:
        see: images (n, 3, S, T) -> one map (n, C, h, w) or more, of several kinds.
        crops: windows (B, 3, S, T), all of one size.

    Returns:
        For each kind, the maps (B, C, h, w) of all windows.
    """
    batch = len(crops[0])
    step = max(1, WINDOWS_AT_ONCE // batch)
    found = [
        [kind.split(batch) for kind in see(torch.cat(list(crops[start : start + step])))]
        for start in range(0, len(crops), step)
    ]
    return [[one for part in kind for one in part] for kind in zip(*found, strict=True)]


def joined(
    maps: Sequence[Tensor], places: Sequence[Place], window: Sequence[int], size: Sequence[int]
) -> Tensor:
    """The windows' maps as one of all pixels, averaged where windows overlap.

    Args:
        maps: (B, C, h, w) of every window, upsampled here to the window.
        places: (top, left) of every window; together they cover the image.
        window: (S, T).
        size: (H, W).

    Returns:
        (B, C, H, W).
    """
    if len(maps) == 1:
        return upsample(maps[0], size)
    total = maps[0].new_zeros((*maps[0].shape[:2], *size))
    count = maps[0].new_zeros(tuple(size))
    for one, (top, left) in zip(maps, places, strict=True):
        at = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        total[at] += upsample(one, window)
        count[at] += 1
    return total.div_(count)


def joined_features(
    maps: Sequence[Tensor],
    places: Sequence[Place],
    window: Sequence[int],
    size: Sequence[int],
    *,
    patch_size: int,
) -> Tensor:
    """The same, averaged over patches (B, C, h, w), a few channels at a time.

    Those of a single window, which is the whole image, stay as they are.
    """
    if len(maps) == 1:
        return maps[0]
    height, width = (-(-side // patch_size) for side in size)
    return torch.cat(
        [
            F.adaptive_avg_pool2d(joined(part, places, window, size), (height, width))
            for part in zip(*(one.split(CHANNELS_AT_ONCE, dim=1) for one in maps), strict=True)
        ],
        dim=1,
    )


def features_in_windows(
    see: Callable[[Tensor], Tensor],
    images: Tensor,
    windows: WindowParams | None,
    *,
    patch_size: int,
) -> Tensor:
    """Features (B, C, h, w) of images (B, 3, H, W), seen in windows unless these are None.

    Args:
        see: images (n, 3, S, T) -> features (n, C, s, t).
        images: of one size.
        windows: their side and stride.
        patch_size: pixels, along a side, that a feature stands for.
    """
    places, crops = cut_windows(images, windows)
    [maps] = over_windows(lambda crop: [see(crop).float()], crops)
    window = crops[0].shape[-2:]
    return joined_features(maps, places, window, images.shape[-2:], patch_size=patch_size)
