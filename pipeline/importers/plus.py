"""A published DenseCLIP+ (MaskCLIP+) as a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.errors import PipelineError
from pipeline.models.plus.network import build_plus
from pipeline.models.plus.published import read_published
from pipeline.models.plus.student import LABEL_0
from pipeline.models.weights.checkpoint import save_checkpoint
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.params.base import EncoderParams


def run(
    *,
    path: Path,
    out_dir: Path,
    encoder: EncoderParams,
    categories: Sequence[str],
    background: Sequence[str],
) -> None:
    """Write a checkpoint that `predict` and `evaluate` take.

    The text that classifies is that of `encoder`, as for every checkpoint; the rows in the file say
    only how many names it was trained with.

    Args:
        path: checkpoint of the published code.
        out_dir: folder to write.
        encoder: the CLIP that guided its training.
        categories: names that it was trained with, in their order.
        background: names of label id 0, of which it asks none.

    Raises:
        PipelineError: the file cannot be read or is none, or was trained with another number of
            names.
    """
    published = read_published(path)
    if len(published.text) != len(categories):
        raise PipelineError(
            f"{path}: trained with {len(published.text)} names, but --categories has "
            f"{len(categories)}"
        )
    architecture = {
        **published.settings,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    with torch.device("meta"):
        network = build_plus(**architecture)
    network.load_state_dict(published.state, assign=True)
    config = {
        "student": "denseclip_plus",
        "architecture": {
            **architecture,
            LABEL_0: "none" if published.background is None else "learned",
        },
        "encoder": encoder.model_dump(mode="json"),
        "categories": list(categories),
        "background": list(background),
        "templates": "prompts85",
        "step": 0,
    }
    save_checkpoint(out_dir, network, config)
