"""Pickled tensors without the dangers of a pickle: nothing but tensors can come out of one.

A pickle names the functions that rebuild its objects, and may name any function. Here three names
are known, and stand for inert makers of our own; every other name ends the reading.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import PipelineError, first_line


class StoredTensor(NamedTuple):
    """A tensor as its pickle holds it: the unread bytes of its storage, and its place there.

    Attributes:
        data: the storage, saved by `torch.save`.
        offset, size, stride: of the tensor within the storage, in elements.
    """

    data: Any
    offset: Any
    size: Any
    stride: Any


def load_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read a pickled dict of name -> tensor, as `pickle.dump` writes it.

    The whole file is held in memory; `read_tensor` turns an entry into an array.

    Raises:
        PipelineError: no such file, not a pickle of that kind, or one that asks for anything but
            tensors; the message names what it asks for.
    """
    try:
        with Path(path).open("rb") as file:
            content = _TensorUnpickler(file, path).load()
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file") from None
    except (PipelineError, OSError):
        raise
    except Exception as error:  # a damaged or hostile pickle may raise any exception
        raise PipelineError(
            f"{path}: not a readable pickle: {type(error).__name__}: {error}"
        ) from None
    expected = f"{path}: expected a pickled dict of file name -> tensor"
    if type(content) is not dict:
        raise PipelineError(f"{expected}, found a {type(content).__name__}")
    for name, tensor in content.items():
        if type(name) is not str or type(tensor) is not StoredTensor:
            raise PipelineError(f"{expected}; the entry {name!r} is a {type(tensor).__name__}")
    return content


def read_tensor(tensor: StoredTensor) -> NDArray[np.float32]:
    """The values of a tensor.

    Raises:
        ValueError: its storage is damaged, is not one of floating-point numbers, does not reach as
            far as the tensor, or asks for anything but a storage.
    """
    try:
        storage = torch.load(io.BytesIO(tensor.data), map_location="cpu", weights_only=True)
        if not isinstance(storage, torch.storage.TypedStorage):
            raise ValueError(f"a {type(storage).__name__} in place of a storage")
        if not storage.dtype.is_floating_point:
            raise ValueError(f"of type {storage.dtype}, not floating-point")
        values = torch.empty(0, dtype=storage.dtype).set_(storage)
        if math.prod(tensor.size) > values.numel():
            raise ValueError(f"size {tensor.size} in a storage of {values.numel()}")
        view = torch.as_strided(values, tensor.size, tensor.stride, tensor.offset)
        return view.float().numpy().copy()
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(error)) from None
    except Exception as error:  # as above: any exception may come out of hostile bytes
        raise ValueError(first_line(error)) from None


class _StorageMaker:
    """Stands for torch.storage._load_from_bytes: keeps the bytes. Without attributes to tamper."""

    __slots__ = ()

    def __call__(self, data: Any) -> Any:
        return data


class _TensorMaker:
    """Stands for torch._utils._rebuild_tensor_v2: keeps what the tensor is made of."""

    __slots__ = ()

    def __call__(
        self, storage: Any, offset: Any, size: Any, stride: Any, *_gradient_and_hooks: Any
    ) -> StoredTensor:
        return StoredTensor(storage, offset, size, stride)


class _HooksMaker:
    """Stands for collections.OrderedDict, which holds a tensor's hooks: always empty."""

    __slots__ = ()

    def __call__(self) -> None:
        return None


MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch.storage", "_load_from_bytes"): _StorageMaker(),
    ("torch._utils", "_rebuild_tensor_v2"): _TensorMaker(),
    ("collections", "OrderedDict"): _HooksMaker(),
}


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """The maker that a name of the pickle stands for."""
        if (module, name) not in MAKERS:
            raise PipelineError(
                f"{self._path}: refused: the pickle asks for {module}.{name}, but a file of "
                "embeddings needs tensors only; do not load it with anything else either"
            )
        return MAKERS[module, name]


def _refusal(error: Exception) -> str:
    """What torch's own restricted unpickler did not allow, without its advice to allow it."""
    words = str(error).split()
    names = [name for word, name in pairwise(words) if word == "GLOBAL"]
    return f"refused: its storage asks for {names[0]}" if names else "its storage is damaged"
