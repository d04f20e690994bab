"""Masks by a saliency network in an ONNX file, run by onnxruntime on the CPU.

Letters: B images, H W pixels of an image, S T height and width of the network's input, s t those of
its output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import PipelineError, first_line, install_command, listing

if TYPE_CHECKING:
    from pipeline.engine.runtime import Runtime
    from pipeline.methods.masks import OnnxParams

FLOAT = "tensor(float)"
COLOURS = 3
PROBABILITY_SLACK = 1e-3  # rounding of a sigmoid in half precision


class OnnxSource:
    """A saliency network as a mask source, see `pipeline.methods.masks.MaskSource`."""

    def __init__(self, params: OnnxParams, runtime: Runtime) -> None:
        del runtime  # the network runs in float32 on the CPU, whatever the others do
        content = _read(params.weights)
        self._session = _open(content, params.weights)
        self._input = _checked_input(self._session, params.weights)
        self._size = _input_size(self._input.shape, params)
        self._output = _checked_output(self._session, params)
        self._params = params
        self._mean = torch.tensor(params.mean).view(1, COLOURS, 1, 1)
        self._std = torch.tensor(params.std).view(1, COLOURS, 1, 1)
        self.threshold = params.threshold
        self.max_pixels = params.max_pixels
        self.settings = {
            "source": params.source,
            "weights": hashlib.sha256(content).hexdigest(),
            "size": list(self._size),
            "mean": list(params.mean),
            "std": list(params.std),
            "resize": params.resize,
            "output": self._output,
            "activation": params.activation,
            "threshold": params.threshold,
        }

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> probabilities (B, H, W) of the salient object.

        Raises:
            PipelineError: the network fails, or its output is no map of probabilities.
        """
        height, width = images.shape[-2:]
        if self._params.resize == "stretch":
            maps = self._run(_resized(images, self._size))
            return _resized(maps, (height, width))[:, 0]
        top, left, inner = _place(size=(height, width), within=self._size)
        rows, columns = slice(top, top + inner[0]), slice(left, left + inner[1])
        canvas = images.new_zeros(len(images), COLOURS, *self._size)
        canvas[..., rows, columns] = _resized(images, inner)
        maps = _resized(self._run(canvas), self._size)[..., rows, columns]
        return _resized(maps, (height, width))[:, 0]

    def _run(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, T) in [0, 1] -> probabilities (B, 1, s, t)."""
        pixels = ((images - self._mean) / self._std).numpy()
        maps = [self._maps(batch) for batch in self._batches(pixels)]
        probs = torch.from_numpy(np.concatenate(maps))
        if self._params.activation == "sigmoid":
            return probs.sigmoid()
        return self._checked_probs(probs)

    def _batches(self, pixels: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """All images together, or one by one for a network that takes one."""
        yield from pixels[:, None] if self._input.shape[0] == 1 else [pixels]

    def _maps(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network's answer to (B, 3, S, T) pixels: (B, 1, s, t)."""
        weights = self._params.weights
        try:
            (maps,) = self._session.run([self._output], {self._input.name: pixels})
        except Exception as error:  # onnxruntime raises many kinds
            raise PipelineError(
                f"mask.weights: {weights}: the network fails on an input of {pixels.shape} "
                f"({first_line(error)}); check mask.size"
            ) from None
        if maps.ndim == 3:
            maps = maps[:, None]
        if maps.ndim != 4 or len(maps) != len(pixels) or maps.shape[1] != 1 or not maps.size:
            raise PipelineError(
                f"mask.output: {self._output!r} of {weights} has the shape {maps.shape} for "
                f"{len(pixels)} images; expected (B, 1, h, w) or (B, h, w){self._others()}"
            )
        if not np.isfinite(maps).all():
            raise PipelineError(
                f"mask.output: {self._output!r} of {weights} holds values that are not finite; "
                f"check mask.mean and mask.std{self._others()}"
            )
        return maps

    def _checked_probs(self, probs: Tensor) -> Tensor:
        low, high = float(probs.min()), float(probs.max())
        if low < -PROBABILITY_SLACK or high > 1 + PROBABILITY_SLACK:
            raise PipelineError(
                f"mask.activation: none, but {self._output!r} of {self._params.weights} has values "
                f"from {low:.3g} to {high:.3g}, which are no probabilities; set it to sigmoid if "
                "they are logits"
            )
        return probs

    def _others(self) -> str:
        """A hint at the network's other outputs, if there are any."""
        names = [output.name for output in self._session.get_outputs()]
        others = [name for name in names if name != self._output]
        return f"; other outputs: {listing(others)}" if others else ""


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise PipelineError(
            f"mask.source: onnx needs a further package: {install_command('photos')} ({error})"
        ) from None
    return onnxruntime


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PipelineError(f"mask.weights: {path}: no such file; expected a .onnx file") from None
    except OSError as error:
        raise PipelineError(f"mask.weights: {path}: cannot be read: {error.strerror}") from None


def _open(content: bytes, path: Path) -> Any:
    """A session of the network `content`, whose weights are all inside.

    That makes the hash of the file the hash of the network.
    """
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors, which are raised as well
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds
        raise PipelineError(
            f"mask.weights: {path}: onnxruntime {runtime.__version__} cannot load it "
            f"({first_line(error)}); expected a network in ONNX's format, in one file"
        ) from None


def _checked_input(session: Any, path: Path) -> Any:
    """The only input, if it takes images."""
    inputs = session.get_inputs()
    described = listing([f"{entry.name} {entry.type} {entry.shape}" for entry in inputs])
    if len(inputs) == 1:
        [entry] = inputs
        shape = entry.shape
        takes_images = entry.type == FLOAT and len(shape) == 4 and _fits(shape[1], COLOURS)
        if takes_images and _fits(shape[0], 1):
            return entry
    raise PipelineError(
        f"mask.weights: {path}: inputs: {described}; expected one of float32 images (B, 3, H, W), "
        "B 1 or any; export the network anew"
    )


def _input_size(shape: list[Any], params: OnnxParams) -> tuple[int, int]:
    """Height and width (S, T) of the input: the network's own, or those of the params."""
    own = shape[2:]
    if params.size is None:
        if all(isinstance(side, int) for side in own):
            return own[0], own[1]
        raise PipelineError(
            f"mask.size: {params.weights} takes images of any size; set the one it was trained "
            "with, such as 320 or [240, 320]"
        )
    height, width = params.size
    if not (_fits(own[0], height) and _fits(own[1], width)):
        raise PipelineError(
            f"mask.size: [{height}, {width}], but {params.weights} takes images of "
            f"[{own[0]}, {own[1]}]; remove it, or export the network for that size"
        )
    return height, width


def _checked_output(session: Any, params: OnnxParams) -> str:
    """Name of the output that is the saliency map."""
    outputs = {entry.name: entry for entry in session.get_outputs()}
    name = params.output or next(iter(outputs))
    if name not in outputs:
        raise PipelineError(
            f"mask.output: {params.weights} has no output {name!r}; its outputs: "
            f"{listing(list(outputs))}"
        )
    if outputs[name].type != FLOAT:
        raise PipelineError(
            f"mask.output: {name!r} of {params.weights} is {outputs[name].type}; expected {FLOAT}: "
            "choose another, or export the network in float32"
        )
    return name


def _fits(dimension: Any, wanted: int) -> bool:
    """Whether a dimension is `wanted`, or may be anything (then it is a name or None)."""
    return not isinstance(dimension, int) or dimension == wanted


def _place(*, size: tuple[int, int], within: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
    """Top, left and (height, width) of an image of `size` that fills the middle of a canvas."""
    scale = min(within[0] / size[0], within[1] / size[1])
    height, width = (
        min(most, max(1, round(side * scale))) for side, most in zip(size, within, strict=True)
    )
    return (within[0] - height) // 2, (within[1] - width) // 2, (height, width)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) at another size; averages if smaller, bilinear if larger."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)
