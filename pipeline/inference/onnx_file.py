"""A student in an ONNX file: what its metadata say, and how it is opened. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.errors import PipelineError, first_line, install_command
from pipeline.params.base import PredictionSettings, Section

FORMAT = 1  # that of `OnnxInfo`; to be raised when earlier files would be read wrongly
FORMAT_KEY = "format"
INSTALL = install_command("onnx")
THREADS_VARIABLE = "OMP_NUM_THREADS"
ERRORS_ALONE = 3  # severity of onnxruntime's log


class OnnxInfo(Section):
    """What `metadata_props` of the file hold, each value as JSON.

    `version` is that of the package that wrote it, `opset` that of ONNX's operators. `checkpoint`
    is the SHA-256 of the weights, `student`, `encoder`, `templates` and `step` are what its
    config.json says. `categories` are the names by label id from 1, `background` those whose mean
    embedding is label id 0. The network takes `mean` off RGB in [0, 1] and divides by `std` by
    itself. It takes images of `size` [H, W] alone, or of any size where that is null, no side
    below `smallest`. `patch_size` and `settings` say which size an image is brought to, and how
    outputs become a prediction; `logit_scale` is the factor of the logits in their softmax.
    """

    format: Literal[1] = 1
    version: str
    opset: int
    int8: bool
    student: str
    checkpoint: str
    encoder: str
    templates: str
    step: int
    categories: list[str]
    background: list[str]
    mean: list[float]
    std: list[float]
    size: list[int] | None
    smallest: int
    patch_size: int
    logit_scale: float
    settings: PredictionSettings

    def to_props(self) -> dict[str, str]:
        """Text by name."""
        content = self.model_dump(mode="json")
        return {name: json.dumps(value, ensure_ascii=False) for name, value in content.items()}

    @classmethod
    def of_props(cls, props: Mapping[str, str], path: Path) -> OnnxInfo:
        """What `to_props` wrote.

        Raises:
            PipelineError: something else wrote it, or another version.
        """
        if FORMAT_KEY not in props:
            raise PipelineError(
                f"--onnx {path}: has no metadata of a student; expected a file that `pipeline "
                "export --to onnx` wrote"
            )
        try:
            own = {name: json.loads(props[name]) for name in cls.model_fields if name in props}
            return cls.model_validate(own)
        except ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"]))
        except ValueError:
            place = "JSON"
        raise PipelineError(
            f"--onnx {path}: metadata: {place}: not what this version reads (format {FORMAT}); "
            "export the student again"
        )


def open_onnx(content: bytes, path: Path, threads: int | None = None) -> Any:
    """A session of onnxruntime on the CPU.

    Args:
        content: of the file.
        path: the file, for messages.
        threads: that it computes in; by default those of $OMP_NUM_THREADS, else one a core.

    Raises:
        PipelineError: onnxruntime is missing, or cannot load it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise PipelineError(f"--onnx needs a further package: {INSTALL} ({error})") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads() if threads is None else threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = ERRORS_ALONE
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many kinds
        raise PipelineError(
            f"--onnx {path}: onnxruntime {onnxruntime.__version__} cannot load it "
            f"({first_line(error)}); expected a file that `pipeline export --to onnx` wrote"
        ) from None


def _threads() -> int:
    """As many as torch would take; 0 leaves it to onnxruntime."""
    text = os.environ.get(THREADS_VARIABLE, "")
    return int(text) if text.isdecimal() else 0


def read_onnx(path: Path) -> bytes:
    """Content of the file.

    Raises:
        PipelineError: there is none, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PipelineError(
            f"--onnx {path}: no such file; `pipeline export --to onnx` writes one"
        ) from None
    except OSError as error:
        raise PipelineError(f"--onnx {path}: cannot be read: {error.strerror}") from None
