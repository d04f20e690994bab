"""Read weights files without running code, and load them strictly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import PipelineError

LISTED_KEYS = 10


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
