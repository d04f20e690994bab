"""Assemble networks; save and load checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.files import atomic_path, write_json
from pipeline.models.decoder import TransformerDecoder
from pipeline.models.tokens import vision_tower
from pipeline.models.zutis import Perceptron, Zutis

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FFN_HIDDEN = 256
LISTED_KEYS = 10


def build_zutis(
    encoder: nn.Module,
    *,
    num_queries: int = 100,
    decoder_layers: int = 6,
    num_heads: int = 8,
    feedforward_dim: int = 2048,
    stop_gradient: bool = True,
    query_norm: bool = True,
) -> Zutis:
    """Put a freshly initialised ZUTIS around a CLIP vision transformer.

    Args:
        encoder: CLIP vision transformer; trained further, not copied.
        num_queries: Learned queries Q.
        decoder_layers: Decoder layers L.
        num_heads: Attention heads of the decoder, a divisor of the encoder's width.
        feedforward_dim: Hidden width of the decoder's feed-forward parts.
        stop_gradient: see `Zutis`.
        query_norm: see `Zutis`.

    Raises:
        PipelineError: `encoder` is not a CLIP vision transformer, or the numbers do not fit
            together; the message says which.
    """
    width = vision_tower(encoder).class_embedding.shape[0]
    return Zutis(
        encoder,
        TransformerDecoder(width, decoder_layers, num_heads, feedforward_dim),
        Perceptron(width, FFN_HIDDEN, FFN_HIDDEN, width),
        Perceptron(width, FFN_HIDDEN, FFN_HIDDEN, width),
        torch.randn(num_queries, width),
        stop_gradient=stop_gradient,
        query_norm=query_norm,
    )


def save_checkpoint(folder: Path, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `config.json`; neither changes unless both could be written.

    Args:
        folder: Made if absent; other files in it stay.
        model: Its state dict is stored, under its own keys.
        config: JSON-serialisable: architecture, categories, step, settings.
    """
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    folder = Path(folder)
    with (
        atomic_path(folder / CONFIG_NAME) as config_path,
        atomic_path(folder / WEIGHTS_NAME) as weights_path,
    ):
        save_file(tensors, weights_path)
        write_json(config_path, dict(config))


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a bare state dict onto the CPU: safetensors, or a PyTorch file without code in it.

    Raises:
        PipelineError: the file is missing, damaged, or holds something other than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise PipelineError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PipelineError(
            f"{path}: cannot be read as weights ({reason}); expected safetensors or a .pt file "
            "with a plain state dict, download it again if it is damaged"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise PipelineError(f"{path}: expected a plain state dict (names to tensors)")
    return dict(state)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load `state` into `model` if every name and shape agrees; otherwise change nothing.

    Args:
        model: Network in which the values end, on its device and in its dtype.
        state: Names to tensors.
        source: Where `state` comes from, for the message.

    Raises:
        PipelineError: lists missing, unexpected and wrongly shaped tensors and the architecture
            that was expected.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} is {list(state[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if missing or unexpected or misshapen:
        lists = [_listing("missing", missing), _listing("unexpected", unexpected)]
        lists.append(_listing("wrong shape", misshapen))
        architecture = f"{type(model).__name__}({model.extra_repr()})"
        raise PipelineError(
            f"{source}: not the weights of the expected network {architecture}\n"
            + "\n".join(line for line in lists if line)
            + "\nchoose the matching architecture in params.yaml or another weights file"
        )
    model.load_state_dict(dict(state))


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return f"  {title} ({len(names)}): {', '.join(names[:LISTED_KEYS])}{more}"
