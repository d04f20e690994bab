"""Read weights files without running code, load them strictly, and write them."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

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


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weights file of any layout; nothing is unpickled but tensors.

    Accepts .safetensors, .pt, .pth, .bin and OpenAI's TorchScript archives, if they have no code
    that runs when they are loaded; unwraps `state_dict` and the prefix `module.`.

    Raises:
        PipelineError: missing, unreadable, or not a dict of tensors.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        state: Any = load_state(path)
    else:
        state = _read_pickled(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise PipelineError(f"{path}: holds no dict of tensors; save the model's state_dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _read_pickled(path: Path) -> Any:
    """Content of a PyTorch file (tensors and containers only) or a TorchScript archive."""
    with reading_weights(path):
        if _is_torchscript(path):
            _check_inert(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return torch.jit.load(path, map_location="cpu").state_dict()
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _check_inert(path: Path) -> None:
    """Refuse a TorchScript archive with code of its own to load it, which may write any file.

    The names and contents are asked of the reader that `torch.jit.load` uses: another one could be
    shown another archive.

    Raises:
        pickle.UnpicklingError: it has such code, or is of the oldest form, whose code has any name.
    """
    archive = torch._C.PyTorchFileReader(str(path))
    for name in archive.get_all_records():
        is_code = name.startswith("code/") and not name.endswith(".debug_pkl")
        if name == "model.json" or (is_code and b"__setstate__" in archive.get_record(name)):
            raise pickle.UnpicklingError(f"{name} would run")


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


def save_tensors(
    state: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, with texts in its header; tensors of any memory layout.

    Raises:
        OSError: the write failed; safetensors itself would hide that in an error of its own.
    """
    try:
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        number = int(code.group(1))
        raise OSError(number, os.strerror(number), str(path)) from None


class Hasher(Protocol):
    """A hash object of hashlib."""

    def update(self, data: Any, /) -> None: ...


def hash_tensors(hasher: Hasher, state: Mapping[str, Tensor]) -> None:
    """Add names, shapes, types and values of all tensors to a hash, in the order of the names."""
    for name, tensor in sorted(state.items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(data.numpy().data)


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Load `state` into `model` if every name and shape agrees; otherwise change nothing.

    Args:
        model: network in which the values end, on its device and in its dtype.
        state: names to tensors.
        source: where `state` comes from, for the message.

    Raises:
        PipelineError: as `check_strict`.
    """
    check_strict(model, state, source)
    model.load_state_dict(dict(state))


def check_strict(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Compare the names and shapes of `state` with those of `model`, which may be on "meta".

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


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return f"  {title} ({len(names)}): {', '.join(names[:LISTED_KEYS])}{more}"
