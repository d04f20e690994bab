"""The protocol of an evaluation: all that one must know to compare its numbers with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.runtime import Runtime
from pipeline.files import digest, file_sha256
from pipeline.inference.kept import kept_protocol, others_beside
from pipeline.inference.labeller import Labeller
from pipeline.inference.onnx import OnnxSegmenter
from pipeline.inference.segmenter import Segmenter
from pipeline.models.layers.regions import regions_protocol
from pipeline.models.weights.checkpoint import WEIGHTS_NAME, read_checkpoint_config
from pipeline.params.base import EncoderParams, PredictionSettings
from pipeline.params.benches import BenchParams
from pipeline.vocabulary.categories import texts_for, unasked_names

DIGITS = 12
# Named where they are another, so that what is known of other predictions reads as before.
USUAL = {"corruption_channels": "rgb", "rounding": "down", "upsampling": "direct"}


def bench_protocol(
    bench: BenchParams,
    *,
    categories: Sequence[str],
    names: Sequence[str],
    metrics: Sequence[str],
    settings: PredictionSettings,
    runtime: Runtime,
) -> dict[str, Any]:
    """What is scored, and on which input.

    Args:
        bench: the benchmark.
        categories: names by label id from 1.
        names: all that any image asks for; the categories, unless images have names of their own.
        metrics: what is scored.
        settings: how predictions are made.
        runtime: precision, and seed of corruptions.
    """
    corruption = bench.corruption
    # Named where there are any, so that what is known of other benchmarks reads as before.
    others = {"other_categories": "background"} if bench.scored else {}
    return {
        "split": bench.split,
        "num_categories": len(categories),
        "categories_hash": digest(list(categories))[:DIGITS],
        "asked_names": "categories" if list(names) == list(categories) else "of each image",
        "metrics": ", ".join(metrics),
        "background_scored": bench.background,
        **others,
        "unseen": ", ".join(bench.unseen) or None,
        "corruption": f"{corruption.name} {corruption.level}" if corruption else None,
        "corruption_seed": runtime.seed if corruption else None,
        **_unusual(corruption_channels=bench.corruption_channels if corruption else "rgb"),
        **kept_protocol(settings),
        "resize_to": settings.resize_to,
        "max_side": settings.max_side,
        "whole_patches": settings.whole_patches,
        **_unusual(rounding=settings.rounding, upsampling=settings.upsampling),
        "void": "not scored",
        "sliding_window": False,
        "refinement": "none",
        "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
    }


def network_protocol(segmenter: Segmenter, checkpoint_dir: Path) -> dict[str, Any]:
    """How a checkpoint predicts."""
    config = read_checkpoint_config(checkpoint_dir)
    asked = [*segmenter.categories, *others_beside(segmenter.categories, segmenter.settings)]
    return {
        "model": config.student,
        "encoder": config.encoder.tag,
        "checkpoint": file_sha256(checkpoint_dir / WEIGHTS_NAME)[:DIGITS],
        "step": config.step,
        "open_vocabulary": not set(segmenter.categories) <= set(config.categories),
        "background": ", ".join(unasked_names(config.background, asked)),
        "templates": config.templates,
        **_texts_protocol(texts_for(segmenter.categories, config.texts)),
        **segmenter.student.protocol(segmenter.settings),
        **_beyond_the_papers(segmenter.settings),
    }


def onnx_protocol(segmenter: OnnxSegmenter) -> dict[str, Any]:
    """How a network in ONNX's format predicts."""
    info, settings = segmenter.network.info, segmenter.settings
    # In place of what `bench_protocol` says of torch.
    return {
        "model": info.student,
        "encoder": info.encoder,
        "checkpoint": info.checkpoint[:DIGITS],
        "step": info.step,
        "open_vocabulary": False,
        "background": ", ".join(info.background),
        "templates": info.templates,
        "threshold": settings.threshold,
        "temperature": settings.temperature,
        "suppression": settings.suppression,
        "score_resolution": settings.score_resolution,
        **regions_protocol(settings),
        **_beyond_the_papers(settings),
        "onnx": segmenter.network.sha256[:DIGITS],
        "precision": "int8" if info.int8 else "float32",
    }


def _beyond_the_papers(settings: PredictionSettings) -> dict[str, Any]:
    """What refines a network's prediction, named where it is on."""
    entries: dict[str, Any] = {"flip": True} if settings.flip else {}
    if settings.joint_foreground:
        entries["joint_foreground"] = True
    if (pamr := settings.pamr) is not None:
        # In place of what `bench_protocol` says of those that do not.
        entries |= {"refinement": "pamr", "pamr": _in_words(pamr, pamr.model_dump(mode="json"))}
    if (crops := settings.crop_names) is not None:
        entries["crop_names"] = _in_words(crops, crops.model_dump(mode="json"))
    return entries


def labeller_protocol(labeller: Labeller) -> dict[str, Any]:
    """How a dense labeller labels."""
    params = labeller.params
    # In place of what `bench_protocol` says of those that do neither.
    windows = {} if params.windows is None else {"sliding_window": True}
    refined = {} if params.pamr is None else {"refinement": "pamr"}
    return {
        "model": params.method,
        "encoder": params.encoder.tag,
        "background": ", ".join(labeller.names.background),
        **{
            name: _in_words(getattr(params, name), value) for name, value in params.recipe().items()
        },
        **_texts_protocol(texts_for(labeller.names.categories, labeller.names.texts)),
        **windows,
        **refined,
    }


def _texts_protocol(texts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The texts of categories, where any has other words than its name."""
    lines = (f"{name} {'/'.join(words)}" for name, words in texts.items())
    return {"texts": ", ".join(lines)} if texts else {}


def protocol_lines(settings: Mapping[str, Any]) -> list[str]:
    """`name: value` lines, because DVC makes a column of every value that is not in a list."""
    return [f"{name}: {'none' if value is None else value}" for name, value in settings.items()]


def _unusual(**settings: str) -> dict[str, str]:
    return {name: value for name, value in settings.items() if value != USUAL[name]}


def _in_words(param: Any, value: Any) -> Any:
    """A setting in one line; `value` is what JSON has of `param`."""
    if isinstance(param, EncoderParams):
        return param.tag
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(None, part)}" for name, part in value.items())
    return "/".join(map(str, value)) if isinstance(value, list) else value
