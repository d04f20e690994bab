"""Tokens of a whole image from windows of it.

Letters: B images, H W pixels, h w patch grid, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Side of square windows and the step between them; a step of at most the side."""

    side: int
    stride: int

    def starts(self, length: int) -> list[int]:
        """Where windows begin along a side of that length, the last flush with its end."""
        last = max(0, length - self.side)
        return [*range(0, last, self.stride), last]


def stitch(
    walk: Callable[[Tensor], Sequence[Tensor]], images: Tensor, windows: Windows, *, patch: int
) -> list[Tensor]:
    """What a ViT's blocks make of windows, put together on the grid of the whole image.

    A patch in several windows gets the mean of what they say, the class token that of all windows.
    Where an image is smaller than a window, so is the window.

    Args:
        walk: of images (B, 3, H', W') to tensors (B, 1 + h' w', D), class token first.
        images: (B, 3, H, W), of whole patches.
        windows: side and step.
        patch: side of a patch in pixels.

    Returns:
        Tensors (B, 1 + h w, D), as many as `walk` gives.
    """
    height, width = (side // patch for side in images.shape[-2:])
    count = images.new_zeros(height, width, 1)
    totals: list[Tensor] = []
    class_tokens = []
    for top in windows.starts(height):
        for left in windows.starts(width):
            rows, columns = slice(top, top + windows.side), slice(left, left + windows.side)
            count[rows, columns] += 1
            states = walk(images[..., _pixels(rows, patch), _pixels(columns, patch)])
            class_tokens.append([state[:, :1] for state in states])
            if not totals:
                totals = [
                    state.new_zeros(len(state), height, width, state.shape[2]) for state in states
                ]
            for total, state in zip(totals, states, strict=True):
                part = total[:, rows, columns]
                part += state[:, 1:].unflatten(1, part.shape[1:3])
    means = [torch.stack(tokens).mean(dim=0) for tokens in zip(*class_tokens, strict=True)]
    return [
        torch.cat([mean, (total / count).flatten(1, 2)], dim=1)
        for mean, total in zip(means, totals, strict=True)
    ]


def _pixels(patches: slice, patch: int) -> slice:
    return slice(patches.start * patch, patches.stop * patch)
