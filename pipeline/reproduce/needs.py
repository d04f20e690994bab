"""What a command needs that is not there: data, weights, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.models.weights.zoo import PublishedWeights, is_cached, manifest, published_clip
from pipeline.params.base import EncoderParams
from pipeline.reproduce.recipes import Step

URL = "://"
WEIGHTS_KEYS = ("weights", "backbone_weights", "checkpoint")
SUFFIXES = (".json", ".pt", ".pth", ".bin", ".safetensors", ".onnx")


def missing(step: Step, cache_dir: Path) -> list[str]:
    """What a command reads that is not there, a line each, in the order of its params."""
    return list(dict.fromkeys(_missing(step.sections, cache_dir)))


def _missing(value: Any, cache_dir: Path) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    if value.keys() >= {"model", "pretrained"}:
        yield from _missing_encoder(EncoderParams.model_validate(dict(value)), cache_dir)
        return
    for key, item in value.items():
        if key == "root" and not (URL in item or Path(item).is_dir()):
            yield f"data {item}"
        elif key in WEIGHTS_KEYS and isinstance(item, str):
            yield from _missing_weights(item, cache_dir)
        else:
            yield from _missing(item, cache_dir)


def _missing_weights(name: str, cache_dir: Path) -> Iterator[str]:
    if Path(name).exists():
        return
    entry = manifest().get(name)
    if entry is None:
        yield f"weights {name}"
        return
    yield from _missing_entry(entry, cache_dir)
    if encoder := entry.architecture.get("encoder"):
        yield from _missing_encoder(EncoderParams(**encoder), cache_dir)


def _missing_encoder(encoder: EncoderParams, cache_dir: Path) -> Iterator[str]:
    """Tags that the manifest does not know are open_clip's to download."""
    model, tag = encoder.published_as()
    for file in (model, getattr(encoder.pretrained, "file", tag)):
        if Path(file).suffix in SUFFIXES and not Path(file).exists():
            yield f"weights {file}"
    entry = published_clip(model, tag) or manifest().get(tag)
    if entry is not None:
        yield from _missing_entry(entry, cache_dir)


def _missing_entry(entry: PublishedWeights, cache_dir: Path) -> Iterator[str]:
    if not is_cached(entry, cache_dir):
        yield f"weights {entry.name}"
