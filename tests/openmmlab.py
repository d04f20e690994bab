"""Names and shapes of what OpenMMLab publishes."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = {"resnet50_v1c": (3, 4, 6, 3), "resnet101_v1c": (3, 4, 23, 3)}


def norm_shapes(name: str, width: int) -> dict[str, list[int]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": [width] for part in parts} | {f"{name}.num_batches_tracked": []}


def openmmlab_shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of OpenMMLab's file, classifier included."""
    shapes: dict[str, list[int]] = {"fc.weight": [1000, 2048], "fc.bias": [1000]}
    for index, sizes in enumerate([(32, 3), (32, 32), (64, 32)]):
        shapes[f"stem.{3 * index}.weight"] = [*sizes, 3, 3]
        shapes |= norm_shapes(f"stem.{3 * index + 1}", sizes[0])
    width_in = 64
    for stage, count in enumerate(BLOCKS[name]):
        width = 64 * 2**stage
        for block in range(count):
            prefix = f"layer{stage + 1}.{block}"
            kernels = [(width, width_in, 1), (width, width, 3), (4 * width, width, 1)]
            for index, (outputs, inputs, side) in enumerate(kernels, start=1):
                shapes[f"{prefix}.conv{index}.weight"] = [outputs, inputs, side, side]
                shapes |= norm_shapes(f"{prefix}.bn{index}", outputs)
            if block == 0:
                shapes[f"{prefix}.downsample.0.weight"] = [4 * width, width_in, 1, 1]
                shapes |= norm_shapes(f"{prefix}.downsample.1", 4 * width)
            width_in = 4 * width
    return shapes


def blank(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of these names and shapes that take no memory."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
