"""Checkpoints of the published code (MaskCLIP+, as DenseCLIP+ was called later) as ours.

Letters: C text space, K names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError, listing
from pipeline.models.plus.backbones import BACKBONES, backbone_state, build_backbone
from pipeline.models.plus.heads import HEADS
from pipeline.models.plus.network import build_plus
from pipeline.models.weights.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pipeline.models.weights.weights import check_strict, read_weights

BACKBONE = "backbone."
HEAD = "decode_head.decode_module."
ROWS = {
    "decode_head.text_embeddings": "text",
    "decode_head.bg_embeddings": "background",
    "text_embeddings": "text",
    "bg_embeddings": "background",
}
# The CLIP that guided the training, and the count of its steps.
OF_TRAINING = re.compile(r"decode_head\.(_iter_counter$|clip\.|([qkvc]_)?proj\.)")


@dataclass(frozen=True)
class PublishedPlus:
    """A published network.

    Attributes:
        settings: arguments of `build_plus`, which it fits.
        state: its weights, under our names.
        text: (K, C) float32 rows of the names that it was trained with, as in the file.
        background: (1, C) float32 learned row, as in `state`; None without one.
    """

    settings: dict[str, Any]
    state: dict[str, Tensor]
    text: Tensor
    background: Tensor | None


def read_published(path: Path) -> PublishedPlus:
    """Read a checkpoint of the published code.

    Raises:
        PipelineError: as `convert_published`, or it cannot be read.
    """
    return convert_published(read_weights(Path(path)), path)


def convert_published(state: Mapping[str, Tensor], source: Path | str) -> PublishedPlus:
    """Find out which network a published state dict is of, and rename its tensors.

    Args:
        state: `backbone.*`, `decode_head.decode_module.*`, `text_embeddings` and, where the
            background is scored, `bg_embeddings`. The CLIP of the training is left out.
        source: where it comes from, for the message.

    Raises:
        PipelineError: there are other names, no text, or no network of ours fits; the message
            lists the tensors.
    """
    _check_names(state, source)
    rows = {ours: state[name].float() for name, ours in ROWS.items() if name in state}
    background = rows.get("background")
    theirs = {part: _below(part, state) for part in (BACKBONE, HEAD)}
    with torch.device("meta"):
        backbone = _backbone_of(theirs[BACKBONE])
        settings: dict[str, Any] = {
            "backbone": backbone,
            "head": _head_of(theirs[HEAD]),
            "channels": rows["text"].shape[-1],
            "background": background is not None,
        }
        network = build_plus(**settings, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    trunk = backbone_state(network.backbone, theirs[BACKBONE], f"{source} (as {backbone})")
    ours = {f"backbone.trunk.{name}": value for name, value in trunk.items()}
    ours |= {f"head.{name}": value for name, value in theirs[HEAD].items()}
    if background is not None:
        ours["background"] = background
    check_strict(network, ours, source)
    return PublishedPlus(settings, ours, rows["text"], background)


def _check_names(state: Mapping[str, Tensor], source: Path | str) -> None:
    """Raises PipelineError for names that mean nothing to us, and where there is no text."""
    known = (BACKBONE, HEAD)
    unknown = [
        name
        for name in state
        if not (name.startswith(known) or name in ROWS or OF_TRAINING.match(name))
    ]
    if unknown:
        raise PipelineError(
            f"{source}: not a checkpoint of MaskCLIP+: unknown tensors {listing(unknown)}"
        )
    rows = [value for name, value in state.items() if ROWS.get(name) == "text"]
    if len(rows) != 1 or rows[0].ndim != 2:
        raise PipelineError(
            f"{source}: not a checkpoint of MaskCLIP+: expected one decode_head.text_embeddings "
            f"(K, C), found {[list(value.shape) for value in rows]}"
        )


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def _backbone_of(state: Mapping[str, Tensor]) -> str:
    return _closest(state, {name: build_backbone(name).trunk for name in BACKBONES})


def _head_of(state: Mapping[str, Tensor]) -> str:
    return _closest(state, {name: kind.build(1, 1, 1) for name, kind in HEADS.items()})


def _closest(state: Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> str:
    """Name of the network that shares most names with a state dict."""
    return min(networks, key=lambda name: len(state.keys() ^ networks[name].state_dict().keys()))
