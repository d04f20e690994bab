"""Stage 4: dense labels of the archive images, joined to the mask shards by their keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.engine.batching import equal_size_batches, slices
from pipeline.engine.cache import BlobCache
from pipeline.engine.parallel import Workers
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Job, run_job
from pipeline.errors import PipelineError
from pipeline.formats.dense_labels import CONFIDENCE, LABEL
from pipeline.formats.images import encode_label, encode_png, load_image
from pipeline.formats.labels import BACKGROUND, encode_confidence
from pipeline.formats.shards import SampleStore, open_samples, write_tar
from pipeline.methods.dense import PseudoLabelParams, check_synonyms, load_dense_labeller
from pipeline.vocabulary.categories import Names

MASK_MEMBERS = ("jpg", "mask.png", "json")
BATCHES_AHEAD = 8
LENGTH_BYTES = 4


def run(
    *,
    mask_dir: Path,
    out_dir: Path,
    categories: Sequence[str],
    background: Sequence[str] = ("background",),
    params: PseudoLabelParams,
    runtime: Runtime,
    stats_path: Path,
    executor: Executor | None = None,
) -> None:
    """Write label shards: `label.png` and `confidence.png` under the keys of the mask shards.

    Labels depend on the image alone, not on its archive, and are cached by the image's SHA-256.

    Args:
        mask_dir: mask shards.
        out_dir: label shards, replaced as a whole.
        categories: names by label id; index 0 holds label id 1.
        background: names whose embeddings are averaged for label id 0.
        params: section `pseudo_label` of params.yaml.
        runtime: device, precision and cache.
        stats_path: counts of this run, JSON.
        executor: where shards are made; here by default.

    Raises:
        PipelineError: no samples; a damaged shard; masks made for another category list; an
            encoder that cannot be loaded; synonyms of what is no category.
    """
    names = Names(categories, background)
    check_synonyms(params, names)
    store = open_samples(mask_dir, members=MASK_MEMBERS)
    if len(store) == 0:
        raise PipelineError(f"{mask_dir}: no samples; run the mask stage again")
    for index in range(len(store)):
        _check_category(store, index, categories)
    job = Job(
        "pseudo_label",
        range(len(store)),
        shard_size=params.shard_size,
        load=partial(LabelMaker, store, names, params),
        inputs=store.manifest,
        remedy="Run the mask stage again",
    )
    run_job(job, out_dir=out_dir, stats_path=stats_path, runtime=runtime, executor=executor)


class LabelMaker:
    """Makes shards of labels for the samples of mask shards: from the cache, or new.

    Args:
        store: the samples.
        names: what is told apart.
        params: section `pseudo_label`.
        runtime: device, precision and cache.

    Attributes:
        settings: all that labels depend on besides their image; representable in JSON.
    """

    def __init__(
        self, store: SampleStore, names: Names, params: PseudoLabelParams, runtime: Runtime
    ) -> None:
        self._labeller = load_dense_labeller(params, names, runtime)
        self.settings = {
            "background": list(names.background),
            "categories": list(names.categories),
            "method": params.method,
            "encoder": params.encoder.model_dump(),
            **self._labeller.settings,
            "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
        }
        self._store = store
        self._num_categories = len(names.categories)
        self._batch_size = params.batch_size
        self._runtime = runtime
        self._cache = BlobCache(runtime.cache_dir / "pseudo_label", self.settings)
        self._workers = Workers(params.workers)

    def make(self, items: Sequence[int], path: Path, tally: Tally) -> int:
        """Write the labels of the samples of these numbers."""
        return write_tar(path, self._samples(items, tally))

    def close(self) -> None:
        """Let go of threads and cache."""
        self._workers.close()
        self._cache.close()

    def _samples(self, numbers: Sequence[int], tally: Tally) -> Iterator[dict[str, Any]]:
        for part in slices(numbers, BATCHES_AHEAD * self._batch_size):
            blobs = self._blobs([self._store.member(number, "jpg") for number in part], tally)
            for number, blob in zip(part, blobs, strict=True):
                label, confidence = _unpack(blob)
                yield {
                    "__key__": self._store.keys[number],
                    LABEL: label,
                    CONFIDENCE: confidence,
                }
                tally.advance()

    def _blobs(self, jpegs: Sequence[bytes], tally: Tally) -> list[bytes]:
        """Label and confidence of each image, packed."""
        keys = [sha256(jpeg).hexdigest() for jpeg in jpegs]
        known = {key: blob for key in keys if (blob := self._cache.get(key)) is not None}
        tally.count_in_run("cached", sum(key in known for key in keys))
        new = self._compute(
            {key: jpeg for key, jpeg in zip(keys, jpegs, strict=True) if key not in known}
        )
        for key, blob in new.items():
            self._cache.put(key, blob)
        self._cache.settle()
        blobs = known | new
        return [blobs[key] for key in keys]

    def _compute(self, jpegs: dict[str, bytes]) -> dict[str, bytes]:
        decoded = self._workers.map(load_image, jpegs.values(), ahead=len(jpegs))
        images = dict(zip(jpegs, decoded, strict=True))
        # While the network sees a batch, the workers encode the labels of the one before.
        blobs = {}
        for batch in equal_size_batches(
            images, self._batch_size, size_of=lambda key: images[key].size
        ):
            pixels = torch.stack([_to_tensor(images[key]) for key in batch])
            with self._runtime.autocast():
                labels, confidence = self._labeller.label(pixels.to(self._runtime.device))
            maps = zip(labels.cpu().numpy(), confidence.cpu().numpy(), strict=True)
            for key, pair in zip(batch, maps, strict=True):
                blobs[key] = self._workers.submit(self._encode, pair)
        return {key: blob.result() for key, blob in blobs.items()}

    def _encode(self, maps: tuple[np.ndarray, np.ndarray]) -> bytes:
        label, confidence = maps
        return _pack(
            encode_label(label, self._num_categories), encode_png(encode_confidence(confidence))
        )


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


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) float in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255.0


def _pack(label: bytes, confidence: bytes) -> bytes:
    return len(label).to_bytes(LENGTH_BYTES, "big") + label + confidence


def _unpack(blob: bytes) -> tuple[bytes, bytes]:
    end = LENGTH_BYTES + int.from_bytes(blob[:LENGTH_BYTES], "big")
    return blob[LENGTH_BYTES:end], blob[end:]
