"""The state from which a killed pre-training continues."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.files import atomic_path


def checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights, optimizer and the number of finished iterations to `path`, atomically."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what `checkpoint` wrote, if there is any; return the number of finished iterations."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
