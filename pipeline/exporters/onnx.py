"""A student as an ONNX file, which runs without torch: see `pipeline.inference.onnx`."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline import __version__
from pipeline.engine.runtime import make_runtime
from pipeline.errors import PipelineError, first_line
from pipeline.files import atomic_path, file_sha256
from pipeline.formats.onnx_graph import IMAGES, LABELS, PROPOSALS, SCORES, SIMILARITIES, TEXT
from pipeline.inference.onnx import OnnxNetwork, OnnxSegmenter, check_settings
from pipeline.inference.onnx_file import ERRORS_ALONE, INSTALL, OnnxInfo
from pipeline.inference.segmenter import Segmenter
from pipeline.models.weights.checkpoint import WEIGHTS_NAME, read_checkpoint_config
from pipeline.models.weights.zoo import resolve_weights
from pipeline.vocabulary.categories import unasked_names

if TYPE_CHECKING:
    from pipeline.methods.students import StudentGraph
    from pipeline.params.base import PredictionSettings

OPSET = 17  # the first that has a layer norm
PRODUCER = "zutis-pipeline"
LINEAR = ["MatMul", "Gemm"]  # operators whose weights `int8` means
MAX_DIFFERENCE = 1e-3
MIN_AGREEMENT = 0.999
# Proposals with a token so near the threshold that rounding says whether it is inside.
UNDECIDED = 1e-5
# Sides of the pictures compared, in patches and pixels beyond them.
SHAPES = (((12, 0), (12, 0)), ((9, 3), (14, 5)), ((16, 0), (7, 1)))
LEAST_UNIT = 16


@dataclass(frozen=True)
class Comparison:
    """An ONNX file beside the student that it was made of.

    Attributes:
        sizes: (H, W) of the pictures that both were given.
        difference: largest between their outputs, over the largest value of an output above 1.
        agreement: share of pixels with the same label.
    """

    sizes: list[tuple[int, int]]
    difference: float
    agreement: float

    def describe(self) -> str:
        """One line for a person."""
        sizes = ", ".join(f"{width} x {height}" for height, width in self.sizes)
        return (
            f"beside torch, on pictures of {sizes}: largest difference {self.difference:.2g}, "
            f"{100 * self.agreement:.2f} % of labels equal"
        )


def export_onnx(
    checkpoint: Path | str,
    out_path: Path,
    *,
    settings: PredictionSettings,
    cache_dir: Path,
    categories: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    text_input: bool = False,
    int8: bool = False,
) -> Comparison:
    """Write a student to `out_path`, whole and compared with torch, or not at all.

    Args:
        checkpoint: folder that the train stage wrote, or a published name.
        out_path: the file; one that is there is replaced.
        settings: of predictions, which become the file's.
        cache_dir: of weights.
        categories: any names; None for those of the checkpoint.
        size: (H, W) of the only images that it takes; None for any size.
        text_input: text embeddings are an input, whose default is those of the names.
        int8: weights of linear layers in 8 bits, and their inputs at each run.

    Returns:
        How the file compares.

    Raises:
        PipelineError: a package is missing, the student or a setting has no form in the format, or
            the file says something else than torch (in 8 bits it may).
    """
    _onnx()
    check_settings(settings)
    runtime = make_runtime(device="cpu", precision="float32")
    folder = resolve_weights(checkpoint, cache_dir)
    config = read_checkpoint_config(folder)
    segmenter = Segmenter.load(folder, categories=categories, settings=settings, runtime=runtime)
    origin = {
        "student": config.student,
        "checkpoint": file_sha256(folder / WEIGHTS_NAME),
        "encoder": config.encoder.tag,
        "templates": config.templates,
        "step": config.step,
        "background": list(unasked_names(config.background, segmenter.categories)),
    }
    return write_student(
        segmenter, out_path, origin=origin, size=size, text_input=text_input, int8=int8
    )


def write_student(
    segmenter: Segmenter,
    out_path: Path,
    *,
    origin: Mapping[str, Any],
    size: tuple[int, int] | None = None,
    text_input: bool = False,
    int8: bool = False,
) -> Comparison:
    """Write a loaded student, see `export_onnx`.

    Args:
        segmenter: on the CPU, in float32.
        out_path: the file.
        origin: what `OnnxInfo` says of the checkpoint.
        size: as there; so are `text_input` and `int8`.
    """
    onnx = _onnx()
    graph, settings = segmenter.student.graph(), segmenter.settings
    _check(graph, size, text_input=text_input)
    info = OnnxInfo(
        version=__version__,
        opset=OPSET,
        int8=int8,
        **origin,
        categories=segmenter.categories,
        mean=graph.mean,
        std=graph.std,
        size=None if size is None else list(size),
        smallest=graph.smallest,
        patch_size=segmenter.student.patch_size,
        logit_scale=segmenter.student.logit_scale,
        settings=settings,
    )
    scalars = {name: torch.tensor(getattr(settings, name)) for name in graph.settings}
    content = _traced(graph, scalars, size, text_input=text_input)
    model = onnx.load_from_string(_quantised(content) if int8 else content)
    defaults = {**scalars, **({TEXT: graph.text} if text_input else {})}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(value.numpy(), name) for name, value in defaults.items()
    )
    _describe(model, info)
    onnx.checker.check_model(model)
    with atomic_path(out_path) as temporary:
        temporary.write_bytes(model.SerializeToString())
        comparison = compare(OnnxNetwork.load(temporary), segmenter, graph)
        if not int8:
            _accept(comparison, out_path)
    return comparison


def _onnx() -> ModuleType:
    try:
        import onnx
        import onnxruntime  # noqa: F401 - before the work
    except ImportError as error:
        raise PipelineError(f"--to onnx needs further packages: {INSTALL} ({error})") from None
    return onnx


def _check(graph: StudentGraph, size: tuple[int, int] | None, *, text_input: bool) -> None:
    """Refuse what the graph cannot take."""
    if size is not None and min(size) < graph.smallest:
        raise PipelineError(
            f"--size: {size[0]}x{size[1]}: no side may be below {graph.smallest} pixels"
        )
    if text_input and not graph.takes_text:
        raise PipelineError("--text-input: this student's classifier is learned and has no text")


def _unit(graph: StudentGraph) -> int:
    return max(graph.smallest, LEAST_UNIT)


def _traced(
    graph: StudentGraph,
    scalars: dict[str, torch.Tensor],
    size: tuple[int, int] | None,
    *,
    text_input: bool,
) -> bytes:
    """The graph in ONNX's format.

    Raises:
        PipelineError: the exporter has no operator for a part of it.
    """
    height, width = size or (6 * _unit(graph), 5 * _unit(graph))
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    text = {TEXT: graph.text} if text_input else {}
    buffer = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that are compared while it traces
            torch.onnx.export(
                graph,  # type: ignore[arg-type]  # a module
                (images, text.get(TEXT), *scalars.values()),
                buffer,  # type: ignore[arg-type]  # which it takes, too
                input_names=[IMAGES, *text, *scalars],
                output_names=list(graph.outputs),
                dynamic_axes=_changing_axes(graph.outputs, size, text_input=text_input),
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # torch raises many kinds
        raise PipelineError(
            f"--to onnx: torch {torch.__version__} cannot write this student "
            f"({first_line(error)}); docs/deploy.md says which it can"
        ) from None
    return buffer.getvalue()


def _changing_axes(
    outputs: Mapping[str, tuple[str, ...]], size: tuple[int, int] | None, *, text_input: bool
) -> dict[str, dict[int, str]]:
    """Names of the axes, by input or output, whose length may change from run to run."""
    known = {IMAGES: ("batch", "colours", "height", "width"), TEXT: (LABELS, "features"), **outputs}
    changing = {"batch"}
    if size is None:
        changing |= {"height", "width", "rows", "columns"}
    if text_input:
        changing.add(LABELS)
    return {
        name: {place: axis for place, axis in enumerate(axes) if axis in changing}
        for name, axes in known.items()
        if name != TEXT or text_input
    }


def _quantised(model: bytes) -> bytes:
    """The model with the weights of its linear layers in 8 bits.

    Products of weights alone are made first, or they would be quantised as if they were layers.
    """
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="onnx-") as folder:
        folded, small = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        options = SessionOptions()
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = ERRORS_ALONE
        InferenceSession(model, options, providers=["CPUExecutionProvider"])
        with _without_warnings():
            quantize_dynamic(
                folded,
                small,
                op_types_to_quantize=LINEAR,
                per_channel=True,
                weight_type=QuantType.QInt8,
            )
        return small.read_bytes()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """No advice on the root logger, which asks for what has been done."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _describe(model: Any, info: OnnxInfo) -> None:
    """Metadata of a model, in place."""
    model.producer_name, model.producer_version = PRODUCER, info.version
    del model.metadata_props[:]  # what the quantiser left
    for name, value in info.to_props().items():
        model.metadata_props.add(key=name, value=value)


def compare(network: OnnxNetwork, segmenter: Segmenter, graph: StudentGraph) -> Comparison:
    """What a file says of a few drawn pictures, beside the student that it was made of.

    Args:
        network: the file.
        segmenter: the student.
        graph: of the student.
    """
    own = network.info.size
    sizes = [(own[0], own[1])] if own else _sizes(_unit(graph))
    settings = segmenter.settings.model_copy(update={"resize_to": None, "max_side": None})
    settings = settings.model_copy(update={"whole_patches": False})
    ours = OnnxSegmenter(network, settings=settings)
    theirs = Segmenter(segmenter.student, categories=segmenter.categories, settings=settings)
    differences, equal = [], []
    for number, (height, width) in enumerate(sizes):
        pictures = [_picture(2 * number + place, height, width) for place in range(2)]
        differences.append(_difference(network, graph, pictures, settings))
        for mine, its in zip(ours.predict(pictures), theirs.predict(pictures), strict=True):
            equal.append(float((mine.semantic == its.semantic).mean()))
    return Comparison(sizes, float(np.max(differences)), float(np.mean(equal)))


def _sizes(unit: int) -> list[tuple[int, int]]:
    return [
        (rows * unit + more_rows, columns * unit + more_columns)
        for (rows, more_rows), (columns, more_columns) in SHAPES
    ]


def _picture(seed: int, height: int, width: int) -> Image.Image:
    """Soft blots of colour."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@torch.no_grad()
def _difference(
    network: OnnxNetwork,
    graph: StudentGraph,
    pictures: Sequence[Image.Image],
    settings: PredictionSettings,
) -> float:
    """Largest between outputs for pictures of one size; NaN if one of them has one."""
    pixels = np.stack([np.array(picture) for picture in pictures]).transpose(0, 3, 1, 2)
    images = np.ascontiguousarray(pixels, dtype=np.float32) / np.float32(255)
    scalars = {name: getattr(settings, name) for name in graph.settings}
    found = network.run(images, list(graph.outputs), **scalars)
    tensors = [torch.tensor(value) for value in scalars.values()]
    given = graph(torch.from_numpy(images), None, *tensors)
    outputs = [value.numpy() for value in (given if isinstance(given, tuple) else [given])]
    wanted = dict(zip(graph.outputs, outputs, strict=True))
    decided = _decided(wanted, settings.threshold)
    differences = [
        _largest(found[name][places], value[places])
        for name, value in wanted.items()
        for places in [decided if name in (SIMILARITIES, SCORES) else ...]
    ]
    return float(np.max(differences))  # `max` would lose a NaN


def _decided(outputs: dict[str, NDArray[np.float32]], threshold: float) -> Any:
    """Which proposals (B, Q) have no token at the threshold; all where there are none."""
    if PROPOSALS not in outputs:
        return ...
    return np.abs(outputs[PROPOSALS] - threshold).min(axis=(2, 3)) > UNDECIDED


def _largest(found: Any, wanted: Any) -> float:
    if found.shape != wanted.shape:
        raise PipelineError(f"--to onnx: an output is {found.shape}, of torch {wanted.shape}")
    if not wanted.size:
        return 0.0
    return float(np.abs(found - wanted).max() / np.maximum(1.0, np.abs(wanted).max()))


def _accept(comparison: Comparison, path: Path) -> None:
    """Refuse a file that says something else than torch.

    Raises:
        PipelineError: with both numbers.
    """
    if comparison.difference <= MAX_DIFFERENCE and comparison.agreement >= MIN_AGREEMENT:
        return
    raise PipelineError(
        f"{path}: not written: {comparison.describe()}; at most {MAX_DIFFERENCE:g} and at least "
        f"{100 * MIN_AGREEMENT:g} % were expected; try another torch or onnxruntime"
    )
