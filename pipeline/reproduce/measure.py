"""Size and speed of a network, for which weights do not matter (ZUTIS, Figure 3 and Table 5)."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.methods.students import StudentParams, ZutisParams
from pipeline.models.clip.loading import build_from_config, clip_config
from pipeline.models.zutis.build import build_zutis

WARM_UP, FORWARDS = 2, 10


def run(params: StudentParams, out: Path, runtime: Runtime) -> None:
    """Write the parameters of a ZUTIS and its images a second, one at a time at `crop_size`.

    Args:
        params: section `train`.
        out: metrics file: `encoder_params_m` (millions, of the image encoder), `images_per_s`.
        runtime: device and precision.

    Raises:
        PipelineError: another student, or an encoder that cannot be built.
    """
    if not isinstance(params, ZutisParams):
        raise PipelineError(f"train.student: {params.student}: a zutis is measured")
    config = clip_config(params.encoder, field="train.encoder")
    visual = build_from_config(config, source=params.encoder.model).get_submodule("visual")
    num_params = sum(parameter.numel() for parameter in visual.parameters())
    network = build_zutis(
        visual,
        num_queries=params.num_queries,
        decoder_layers=params.decoder_layers,
        num_heads=params.num_heads,
        feedforward_dim=params.feedforward_dim,
    )
    lines = {
        "encoder": "/".join(params.encoder.published_as()),
        "input": f"one image, {params.crop_size} x {params.crop_size}",
        "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
        "device": _device_name(runtime.device),
    }
    metrics: dict[str, Any] = {
        "encoder_params_m": round(num_params / 1e6, 1),
        "images_per_s": round(_images_per_s(network, params.crop_size, runtime), 1),
        "protocol": [f"{name}: {value}" for name, value in lines.items()],
    }
    write_json(out, metrics)


@torch.inference_mode()
def _images_per_s(network: nn.Module, side: int, runtime: Runtime) -> float:
    network = network.eval().to(runtime.device)
    images = torch.zeros(1, 3, side, side, device=runtime.device)
    start = 0.0
    for number in range(WARM_UP + FORWARDS):
        if number == WARM_UP:
            _finish(runtime.device)
            start = time.perf_counter()
        with runtime.autocast():
            network(images)
    _finish(runtime.device)
    return FORWARDS / (time.perf_counter() - start)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
