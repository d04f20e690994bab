"""The state from which a training that was cut off continues as if nothing had happened.

One safetensors file: `model/<name>`, `optimizer/<number of the parameter>/<name>` and the states of
torch's random generators as tensors, all else as JSON in the header, under a SHA-256 of everything.
It is written whole or not at all, and read without unpickling anything.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import PipelineError
from pipeline.files import atomic_path
from pipeline.models.weights.weights import hash_tensors, load_strict, save_tensors

MODEL, OPTIMIZER = "model/", "optimizer/"
CPU_GENERATOR, CUDA_GENERATOR = "generator/cpu", "generator/cuda"


@dataclass(frozen=True)
class TrainingState:
    """What `read_state` found.

    Attributes:
        step: finished iterations.
        extra: what the caller stored besides.
        tensors: all tensors of the file, on the CPU.
    """

    step: int
    extra: Any
    tensors: dict[str, Tensor]


def save_state(
    path: Path, model: nn.Module, optimizer: Optimizer, *, step: int, extra: Any
) -> None:
    """Write all that training depends on after `step` iterations.

    The settings of the optimizer's groups are not stored: the caller makes them anew.

    Args:
        path: file to write; its folder is made.
        model: network under training.
        optimizer: over the parameters of `model`.
        step: finished iterations.
        extra: anything JSON can hold.
    """
    tensors = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}{number}/{name}": value for name, value in values.items()}
    tensors[CPU_GENERATOR] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors[CUDA_GENERATOR] = torch.cuda.get_rng_state()
    tensors = {name: value.detach().cpu() for name, value in tensors.items()}
    header = json.dumps({"step": step, "extra": extra})
    metadata = {"state": header, "sha256": _sha256(header, tensors)}
    with atomic_path(path) as temporary:
        save_tensors(tensors, temporary, metadata=metadata)


def read_state(path: Path) -> TrainingState | None:
    """What `save_state` wrote; None if there is no such file.

    Raises:
        PipelineError: the file is damaged or something else.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PipelineError(f"{path}: damaged ({error})") from None
    header = metadata.get("state", "")
    if metadata.get("sha256") != _sha256(header, tensors):
        raise PipelineError(f"{path}: damaged (its content differs from its SHA-256)")
    return TrainingState(**json.loads(header), tensors=tensors)


def restore(state: TrainingState, model: nn.Module, optimizer: Optimizer) -> None:
    """Put weights, optimizer and torch's random generators into the state.

    Raises:
        PipelineError: the state is that of another network.
    """
    load_strict(model, _below(state, MODEL), "training state")
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(state, OPTIMIZER).items():
        number, _, kind = name.partition("/")
        moments.setdefault(int(number), {})[kind] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    torch.set_rng_state(state.tensors[CPU_GENERATOR])
    if CUDA_GENERATOR in state.tensors:
        torch.cuda.set_rng_state(state.tensors[CUDA_GENERATOR])


def resume(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Restore what `save_state` wrote, if there is any; the number of finished iterations.

    Raises:
        PipelineError: the file is damaged or of another network.
    """
    state = read_state(path)
    if state is None:
        return 0
    restore(state, model, optimizer)
    return state.step


def _below(state: TrainingState, prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, by the rest of it."""
    return {
        name.removeprefix(prefix): value
        for name, value in state.tensors.items()
        if name.startswith(prefix)
    }


def _sha256(header: str, tensors: dict[str, Tensor]) -> str:
    hasher = hashlib.sha256(header.encode())
    hash_tensors(hasher, tensors)
    return hasher.hexdigest()
