"""Device, precision, seed and progress: decided once, here, and handed to the stages."""

from __future__ import annotations

import ctypes
import os
import platform
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipeline.errors import PipelineError

CACHE_VARIABLE = "PIPELINE_CACHE"
DEVICES = ("cpu", "cuda", "mps")
# Of autocast; None is plain float32.
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# glibc's malloc.h: options of mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Runtime:
    """Where a stage computes and what it starts from.

    Attributes:
        device: the device of the networks.
        amp_dtype: autocast precision, or None for plain float32.
        seed: seed of every random generator.
        cache_dir: folder of results that outlive the outputs of the DAG.
    """

    device: torch.device
    amp_dtype: torch.dtype | None
    seed: int
    cache_dir: Path

    def autocast(self) -> AbstractContextManager[object]:
        """Context in which the networks run."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)


def make_runtime(
    *,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    threads: Literal["auto"] | int = "auto",
) -> Runtime:
    """Pick device and precision.

    Args:
        device: auto (cuda where there is one, else cpu), cpu, cuda or mps. On mps, the GPU of a
            Mac, operations that torch lacks there run on the CPU where $PYTORCH_ENABLE_MPS_FALLBACK
            is 1 before torch is imported; else they are an error that names the variable.
        precision: of the networks: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or
            float16. What is sensitive stays in float32, and so does text.
        seed: see `Runtime`.
        threads: those of torch on the CPU, in this process from now on; `auto` leaves them as they
            are: one a core, or $OMP_NUM_THREADS.

    Raises:
        PipelineError: `device` is not there; it or `precision` is not a known name.
    """
    chosen = _device(device)
    if precision not in ("auto", *PRECISIONS):
        known = ", ".join(("auto", *PRECISIONS))
        raise PipelineError(f"params.yaml: precision: {precision!r} is not one of {known}")
    if precision == "auto":
        precision = "bfloat16" if chosen.type == "cuda" else "float32"
    if threads != "auto":
        torch.set_num_threads(threads)
    if chosen.type == "cpu":
        _keep_freed_memory()
    return Runtime(
        device=chosen,
        amp_dtype=PRECISIONS[precision],
        seed=seed,
        cache_dir=default_cache_dir(),
    )


def _device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        PipelineError: it is not there, or not a known name.
    """
    if name not in ("auto", *DEVICES):
        known = ", ".join(("auto", *DEVICES))
        raise PipelineError(f"params.yaml: device: {name!r} is not one of {known}")
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise PipelineError("params.yaml: device: cuda, but no CUDA device was found; use auto")
    if name == "mps" and not torch.backends.mps.is_available():
        built = torch.backends.mps.is_built()
        reason = "this Mac has none that torch can use" if built else "this torch has no MPS"
        raise PipelineError(f"params.yaml: device: mps, but {reason}; use auto")
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return torch.device(name)


def seed_generators(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _keep_freed_memory() -> None:
    """Let glibc keep up to `KEPT_BYTES` of freed memory for the next batch.

    It hands large blocks back to the kernel at once and faults them in again, page by page: a
    convolutional network, all of whose activations are such blocks, spends two thirds of its time
    there. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def default_cache_dir() -> Path:
    """Folder of cached per-image results: $PIPELINE_CACHE, else the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zutis-pipeline"
