"""Stage 4: dense labels of the archive images by DenseCLIP, beside their pseudo-masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.cache import BlobCache
from pipeline.data.images import encode_label, encode_png, load_image
from pipeline.data.labels import BACKGROUND, encode_confidence
from pipeline.data.shards import SampleStore, open_samples, write_shards
from pipeline.denseclip import build_denseclip
from pipeline.errors import PipelineError
from pipeline.models.clip import load_clip
from pipeline.models.denseclip import DenseClip
from pipeline.parallel import Workers
from pipeline.params import PseudoLabelParams
from pipeline.runtime import Runtime, StageRun

MASK_MEMBERS = ("jpg", "mask.png", "json")
BATCHES_AHEAD = 8
LENGTH_BYTES = 4

Item = TypeVar("Item")


def run(
    *,
    mask_dir: Path,
    out_dir: Path,
    categories: Sequence[str],
    background: Sequence[str] = ("background",),
    params: PseudoLabelParams,
    runtime: Runtime,
    stats_path: Path,
) -> None:
    """Write label shards: the samples of `mask_dir` plus `label.png` and `confidence.png`.

    Labels depend on the image alone, not on its archive, and are cached by the image's SHA-256.

    Args:
        mask_dir: mask shards.
        out_dir: label shards, replaced as a whole.
        categories: names by label id; index 0 holds label id 1.
        background: names whose embeddings are averaged for label id 0.
        params: section `pseudo_label` of params.yaml.
        runtime: device, precision and cache.
        stats_path: counts of this run, JSON.

    Raises:
        PipelineError: no samples; a damaged shard; masks made for another category list; an
            encoder that cannot be loaded.
    """
    store = open_samples(mask_dir, members=MASK_MEMBERS)
    if len(store) == 0:
        raise PipelineError(f"{mask_dir}: no samples; run the mask stage again")
    encoder = load_clip(
        params.encoder.model,
        params.encoder.pretrained,
        runtime.device,
        cache_dir=runtime.cache_dir,
    )
    model = build_denseclip(encoder, categories=categories, background=background, params=params)
    protocol = {
        "background": list(background),
        "categories": list(categories),
        **params.recipe(),
        "weights": encoder.fingerprint(),
        "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
    }
    with (
        StageRun("pseudo_label", stats_path=stats_path, total=len(store)) as stage,
        BlobCache(runtime.cache_dir / "pseudo_label", protocol) as cache,
        Workers(params.workers) as workers,
    ):
        labels = _Labeller(
            model, cache, workers, len(categories), runtime=runtime, batch_size=params.batch_size
        )
        write_shards(
            _labelled_samples(store, categories, labels, stage),
            out_dir,
            shard_size=params.shard_size,
            settings={"encoder": params.encoder.model_dump(), "denseclip": protocol},
        )


class _Labeller:
    """Label and confidence PNGs of images, from the cache or from DenseCLIP."""

    def __init__(
        self,
        model: DenseClip,
        cache: BlobCache,
        workers: Workers,
        num_categories: int,
        *,
        runtime: Runtime,
        batch_size: int,
    ) -> None:
        self.batch_size = batch_size
        self._model = model
        self._cache = cache
        self._workers = workers
        self._num_categories = num_categories
        self._runtime = runtime

    def __call__(self, jpegs: Sequence[bytes]) -> tuple[list[tuple[bytes, bytes]], int]:
        """(label, confidence) of each image, and how many of them were in the cache."""
        keys = [sha256(jpeg).hexdigest() for jpeg in jpegs]
        blobs = {key: blob for key in keys if (blob := self._cache.get(key)) is not None}
        missing = {key: jpeg for key, jpeg in zip(keys, jpegs, strict=True) if key not in blobs}
        for key, blob in self._compute(missing).items():
            self._cache.put(key, blob)
            blobs[key] = blob
        num_cached = sum(key not in missing for key in keys)
        return [_unpack(blobs[key]) for key in keys], num_cached

    def _compute(self, jpegs: dict[str, bytes]) -> dict[str, bytes]:
        by_size: dict[tuple[int, int], list[tuple[str, Image.Image]]] = defaultdict(list)
        images = self._workers.map(load_image, jpegs.values(), ahead=len(jpegs))
        for key, image in zip(jpegs, images, strict=True):
            by_size[image.size].append((key, image))
        # While the network sees a batch, the workers encode the labels of the one before.
        blobs = {}
        for group in by_size.values():
            for batch in _batches(group, self.batch_size):
                pixels = torch.stack([_to_tensor(image) for _, image in batch])
                with self._runtime.autocast():
                    labels, confidence = self._model.label(pixels.to(self._runtime.device))
                maps = zip(labels.cpu().numpy(), confidence.cpu().numpy(), strict=True)
                for (key, _), pair in zip(batch, maps, strict=True):
                    blobs[key] = self._workers.submit(self._encode, pair)
        return {key: blob.result() for key, blob in blobs.items()}

    def _encode(self, maps: tuple[np.ndarray, np.ndarray]) -> bytes:
        label, confidence = maps
        return _pack(
            encode_label(label, self._num_categories), encode_png(encode_confidence(confidence))
        )


def _labelled_samples(
    store: SampleStore, categories: Sequence[str], labels: _Labeller, stage: StageRun
) -> Iterator[dict[str, Any]]:
    for indices in _batches(range(len(store)), BATCHES_AHEAD * labels.batch_size):
        for index in indices:
            _check_category(store, index, categories)
        samples = [store[index] for index in indices]
        pngs, num_cached = labels([sample["jpg"] for sample in samples])
        stage.count("cached", num_cached)
        for sample, (label, confidence) in zip(samples, pngs, strict=True):
            yield {**sample, "label.png": label, "confidence.png": confidence}
            stage.advance()


def _check_category(store: SampleStore, index: int, categories: Sequence[str]) -> None:
    """Refuse a mask that was made for another category list."""
    fields = store.json(index)
    name, label_id = fields["category"], fields["label_id"]
    if label_id == BACKGROUND:
        return
    if not 0 < label_id <= len(categories) or categories[label_id - 1] != name:
        raise PipelineError(
            f"categories: the masks were made for another list: sample {store.keys[index]} is "
            f"{name!r} with label id {label_id}; run retrieve and mask again"
        )


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0


def _pack(label: bytes, confidence: bytes) -> bytes:
    return len(label).to_bytes(LENGTH_BYTES, "big") + label + confidence


def _unpack(blob: bytes) -> tuple[bytes, bytes]:
    end = LENGTH_BYTES + int.from_bytes(blob[:LENGTH_BYTES], "big")
    return blob[LENGTH_BYTES:end], blob[end:]
