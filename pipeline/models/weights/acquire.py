"""Bring published weights into the cache: download or take a file, verify, convert.

The authors' files are read without running code in them, compared with the network at its real
size, and stored as safetensors; nothing pickled is needed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.files import atomic_path, file_sha256, read_json, write_json
from pipeline.models.clip import OPENAI_SCALARS, build_clip, to_open_clip_layout
from pipeline.models.clip.photo_clip import NAME as PHOTO_CLIP
from pipeline.models.clip.photo_clip import image_trunk, package_file
from pipeline.models.layers.dino import build_dino
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig
from pipeline.models.plus.backbones import backbone_state, build_backbone
from pipeline.models.weights.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from pipeline.models.weights.download import discard, download
from pipeline.models.weights.weights import check_strict, read_weights, save_tensors
from pipeline.models.weights.zoo import PublishedWeights, cached_path, card_path, damage, is_cached
from pipeline.models.zutis.build import build_zutis

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

State = dict[str, Tensor]


def fetch(
    entry: PublishedWeights,
    cache_dir: Path,
    *,
    url: str | None = None,
    categories: Sequence[str] = (),
) -> Path:
    """Download published weights, unless an intact copy is in the cache.

    Those of `photo_clip` are taken from the installed package that has them.

    Args:
        entry: what to fetch.
        cache_dir: cache folder.
        url: a mirror; http, https, `file://` or a path. None for the authors' own.
        categories: names that a ZUTIS checkpoint was trained with.

    Returns:
        The copy's path.

    Raises:
        PipelineError: it cannot be downloaded, its package is not installed, it has another hash
            than the manifest or the first fetch recorded, or holds other weights. A download with
            a wrong content is removed.
    """
    if is_cached(entry, cache_dir) and damage(entry, cache_dir) is None:
        return cached_path(entry, cache_dir)
    url = url or (str(package_file()) if entry.kind == PHOTO_CLIP else entry.url)
    local = _local_path(url)
    if local is not None:
        _check_hash(entry, local, cache_dir)
        return _store(entry, local, cache_dir, origin=url, categories=categories)
    suffix = Path(urlparse(url).path).suffix
    part = card_path(entry, cache_dir).with_name(
        f"{entry.name}.part{suffix if suffix in SUFFIXES else '.pt'}"
    )
    part.parent.mkdir(parents=True, exist_ok=True)
    download(url, part, size=entry.size)
    try:
        _check_hash(entry, part, cache_dir)
        path = _store(entry, part, cache_dir, origin=url, categories=categories)
    except PipelineError as error:
        discard(part)
        raise PipelineError(f"{error}\nthe download from {url} was removed") from None
    discard(part)
    return path


def add(
    entry: PublishedWeights, file: Path, cache_dir: Path, *, categories: Sequence[str] = ()
) -> Path:
    """Take weights from a file that the user has; it may hold them in another form.

    Args:
        entry: what the file is.
        file: the authors' file, or their weights saved again as a state dict.
        cache_dir: cache folder.
        categories: names that a ZUTIS checkpoint was trained with.

    Returns:
        The copy's path.

    Raises:
        PipelineError: it cannot be read or holds other weights; the message lists the differences.
    """
    return _store(entry, file, cache_dir, origin=str(file), categories=categories)


def is_published_file(entry: PublishedWeights, cache_dir: Path) -> bool | None:
    """Whether the copy was made from the very file of the manifest; None where no hash is known."""
    if entry.sha256 is None:
        return None
    return _recorded_hash(card_path(entry, cache_dir)) == entry.sha256


def _local_path(url: str) -> Path | None:
    """The file that a `file://` URL or a path names; None for a URL of the network."""
    parts = urlparse(url)
    if parts.scheme in ("http", "https"):
        return None
    path = Path(url2pathname(parts.path)) if parts.scheme == "file" else Path(url)
    if not path.is_file():
        raise PipelineError(f"{url}: no such file; --url takes http, https, file:// or a path")
    return path


def _check_hash(entry: PublishedWeights, file: Path, cache_dir: Path) -> None:
    """Compare a file with the manifest's hash, or with the one that the first fetch recorded.

    Raises:
        PipelineError: they differ; the message names both.
    """
    card = card_path(entry, cache_dir)
    expected = entry.sha256 or _recorded_hash(card)
    found = file_sha256(file)
    if expected is not None and found != expected:
        known = f"recorded in {card} (remove it to accept the new file)"
        raise PipelineError(
            f"{entry.name}: wrong checksum: the file has SHA-256 {found}, "
            f"{'published' if entry.sha256 else known} is {expected}"
        )


def _recorded_hash(card: Path) -> str | None:
    """The hash of the file that the copy was made from; None without a readable card."""
    try:
        return str(read_json(card)["source_sha256"])
    except (PipelineError, KeyError, TypeError):
        return None


def _store(
    entry: PublishedWeights, file: Path, cache_dir: Path, *, origin: str, categories: Sequence[str]
) -> Path:
    """Verify and convert a file; the card comes last, and goes before an old copy is replaced."""
    label = f"{origin} (as {entry.name}: {entry.describe_architecture()})"
    state = CONVERTERS[entry.kind](read_weights(file), entry.architecture, label)
    state = _unshared(state, label)
    card = card_path(entry, cache_dir)
    path = cached_path(entry, cache_dir)
    card.unlink(missing_ok=True)
    contents = [path / WEIGHTS_NAME, path / CONFIG_NAME] if entry.kind == "zutis" else [path]
    with atomic_path(contents[0]) as temporary:
        save_tensors(state, temporary)
    if entry.kind == "zutis":
        write_json(contents[1], _checkpoint_config(entry, categories))
    write_json(
        card,
        {
            "name": entry.name,
            "kind": entry.kind,
            "licence": entry.licence,
            "origin": origin,
            "source_sha256": file_sha256(file),
            "architecture": dict(entry.architecture),
            "files": {str(item.relative_to(card.parent)): file_sha256(item) for item in contents},
        },
    )
    return path


def _unshared(state: State, source: str) -> State:
    """Tensors with memory of their own, as safetensors wants them.

    Raises:
        PipelineError: a tensor has no values, or not all of them.
    """
    for name, value in state.items():
        if value.is_meta or value.layout != torch.strided:
            kind = "has no values" if value.is_meta else f"is stored as {value.layout}"
            raise PipelineError(f"{source}: {name} {kind}; save the model's plain state_dict")
    return {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()
    }


def _checkpoint_config(entry: PublishedWeights, categories: Sequence[str]) -> dict[str, Any]:
    """`config.json` of a published ZUTIS: what `pipeline train` would have written."""
    training = dict(entry.training or {})
    return {
        "architecture": dict(entry.architecture["network"]),
        "encoder": dict(entry.architecture["encoder"]),
        "categories": list(categories),
        "background": ["background"],
        "templates": "name",
        "step": training.get("iterations", 0),
        "training": training,
        "published": {"name": entry.name, "page": entry.page, "licence": entry.licence},
    }


def _convert_clip(state: State, architecture: Mapping[str, Any], source: str) -> State:
    """OpenAI's layout or open_clip's -> open_clip's, with the scalars that tell QuickGELU."""
    clip, converted = _in_open_clip_layout(state, architecture, source)
    sizes = (clip.visual.image_size, clip.context_length, clip.vocab_size)
    scalars = dict(zip(OPENAI_SCALARS, sizes, strict=True))
    size = scalars["input_resolution"]
    scalars["input_resolution"] = size if isinstance(size, int) else size[0]
    return {**converted, **{name: torch.tensor(value) for name, value in scalars.items()}}


def _convert_open_clip(state: State, architecture: Mapping[str, Any], source: str) -> State:
    """Any layout that open_clip reads -> open_clip's."""
    _, converted = _in_open_clip_layout(state, architecture, source)
    return converted


def _in_open_clip_layout(
    state: State, architecture: Mapping[str, Any], source: str
) -> tuple[Any, State]:
    """The network, without values, and the weights under its names, which are compared."""
    with torch.device("meta"):
        clip = build_clip(architecture["model"])
    converted = to_open_clip_layout(clip, state)
    check_strict(clip, converted, source)
    return clip, converted


def _convert_plain(
    build: Callable[[Mapping[str, Any]], nn.Module],
) -> Callable[[State, Mapping[str, Any], str], State]:
    """Converter of weights whose names are ours already: they are compared and kept."""

    def convert(state: State, architecture: Mapping[str, Any], source: str) -> State:
        with torch.device("meta"):
            network = build(architecture)
        check_strict(network, state, source)
        return state

    return convert


def _convert_photo_clip(state: State, architecture: Mapping[str, Any], source: str) -> State:
    del architecture
    return image_trunk(state, source)


def _convert_backbone(state: State, architecture: Mapping[str, Any], source: str) -> State:
    """OpenMMLab's layout or timm's -> timm's, without the classifier."""
    with torch.device("meta"):
        backbone = build_backbone(architecture["model"])
    return backbone_state(backbone, state, source)


def _build_selfmask(architecture: Mapping[str, Any]) -> nn.Module:
    return SelfMask(SelfMaskConfig(**architecture))


def _build_zutis(architecture: Mapping[str, Any]) -> nn.Module:
    clip: Any = build_clip(architecture["encoder"]["model"])
    return build_zutis(clip.visual, **architecture["network"])


def _build_dino(architecture: Mapping[str, Any]) -> nn.Module:
    return build_dino(architecture["model"])


CONVERTERS: dict[str, Callable[[State, Mapping[str, Any], str], State]] = {
    "clip": _convert_clip,
    "open_clip": _convert_open_clip,
    "selfmask": _convert_plain(_build_selfmask),
    "zutis": _convert_plain(_build_zutis),
    "dino": _convert_plain(_build_dino),
    PHOTO_CLIP: _convert_photo_clip,
    "backbone": _convert_backbone,
}
