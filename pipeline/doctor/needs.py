"""What params ask for that is not there: data, weights, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.doctor.network import host_of, hub
from pipeline.models.clip.hub import is_downloaded, is_tag
from pipeline.models.weights.zoo import PublishedWeights, is_cached, manifest, published_clip
from pipeline.params.base import EncoderParams, TaggedFile

URL = "://"
WEIGHTS_KEYS = ("weights", "backbone_weights", "checkpoint")
SUFFIXES = (".json", ".pt", ".pth", ".bin", ".safetensors", ".onnx")


@dataclass(frozen=True)
class Missing:
    """Something that is not there.

    Attributes:
        kind: what it is.
        name: its path, or the name of published weights.
        entry: these; None for a file or folder of one's own, and for a tag that only open_clip
            knows.
        is_fetched: the stage that needs it downloads it.
    """

    kind: Literal["data", "weights"]
    name: str
    entry: PublishedWeights | None = None
    is_fetched: bool = False

    @property
    def host(self) -> str | None:
        """Where it comes from, if that is known: scheme and host."""
        if self.is_fetched:
            return hub()
        return None if self.entry is None else host_of(self.entry.url)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def missing(sections: Any, cache_dir: Path) -> list[Missing]:
    """What params read that is not there, each thing once, in their order.

    Args:
        sections: params as plain values: sections by name.
        cache_dir: the cache folder, with copies of published weights.
    """
    found = {str(item): item for item in _missing(sections, cache_dir)}
    return list(found.values())


def encoders(sections: Any) -> Iterator[EncoderParams]:
    """All encoders that params name."""
    if isinstance(sections, Mapping):
        if _is_encoder(sections):
            yield EncoderParams.model_validate(dict(sections))
            return
        sections = list(sections.values())
    if isinstance(sections, list):
        for item in sections:
            yield from encoders(item)


def _missing(value: Any, cache_dir: Path) -> Iterator[Missing]:
    if isinstance(value, list):
        for item in value:
            yield from _missing(item, cache_dir)
    if not isinstance(value, Mapping):
        return
    if _is_encoder(value):
        yield from _missing_encoder(EncoderParams.model_validate(dict(value)), cache_dir)
        return
    for key, item in value.items():
        if not isinstance(item, str):  # also an entry that somebody has called so
            yield from _missing(item, cache_dir)
        elif key == "root" and not (URL in item or Path(item).is_dir()):
            yield Missing("data", item)
        elif key in WEIGHTS_KEYS:
            yield from _missing_weights(item, cache_dir)


def _is_encoder(section: Mapping[str, Any]) -> bool:
    """Whether a section is an encoder's, and not one of entries that somebody has called so."""
    return section.keys() >= {"model", "pretrained"} and isinstance(section["model"], str)


def _missing_weights(name: str, cache_dir: Path) -> Iterator[Missing]:
    if Path(name).exists():
        return
    entry = manifest().get(name)
    if entry is None:
        yield Missing("weights", name)
        return
    yield from _missing_entry(entry, cache_dir)
    if encoder := entry.architecture.get("encoder"):
        yield from _missing_encoder(EncoderParams(**encoder), cache_dir)


def _missing_encoder(encoder: EncoderParams, cache_dir: Path) -> Iterator[Missing]:
    model, tag = encoder.published_as()
    for file in (model, getattr(encoder.pretrained, "file", tag)):
        if Path(file).suffix in SUFFIXES and not Path(file).exists():
            yield Missing("weights", file)
    if isinstance(encoder.pretrained, TaggedFile):
        return
    entry = published_clip(model, tag) or manifest().get(tag or model)
    if entry is not None and is_cached(entry, cache_dir):
        return
    if is_tag(model, tag):
        if not is_downloaded(model, tag):
            name = f"{model}/{tag}" if entry is None else entry.name
            yield Missing("weights", name, entry, is_fetched=True)
    elif entry is not None:
        yield Missing("weights", entry.name, entry)


def _missing_entry(entry: PublishedWeights, cache_dir: Path) -> Iterator[Missing]:
    if not is_cached(entry, cache_dir):
        yield Missing("weights", entry.name, entry)
