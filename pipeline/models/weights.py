"""Read weights files without running code, load them strictly, and write them."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
    with reading_weights(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise PipelineError(f"{path}: expected a plain state dict (names to tensors)")
    return dict(state)


@contextmanager
def reading_weights(path: Path) -> Iterator[None]:
    """Turn what a reader of weights raises into a message about `path`.

    Raises:
        PipelineError: the block failed.
    """
    try:
        yield
    except pickle.UnpicklingError:  # torch's text advises to unpickle anything: not repeated here
        raise PipelineError(
            f"{path}: cannot be read as weights: no PyTorch file of tensors alone, and other "
            "objects are not unpickled; expected .safetensors or a .pt file of tensors"
        ) from None
    except Exception as error:  # unpickling hostile bytes raises anything
        reason = str(error).strip().split("\n")[0]
        raise PipelineError(
            f"{path}: cannot be read as weights ({type(error).__name__}: {reason}); expected "
            ".safetensors or a .pt file of tensors, download it again if it is damaged"
        ) from None


def save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the write failed; safetensors itself would hide that in an error of its own.
    """
    try:
        save_file(dict(state), path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(path)) from None


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
