"""Stage 4: dense labels of the archive images, joined to the mask shards by their keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.engine.batching import equal_size_batches, slices
from pipeline.engine.cache import BlobCache
from pipeline.engine.dry_run import CacheUse, DryRun
from pipeline.engine.parallel import Workers
from pipeline.engine.progress import Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Job, run_job
from pipeline.errors import PipelineError
from pipeline.formats.bank import read_bank
from pipeline.formats.dense_labels import CONFIDENCE, LABEL
from pipeline.formats.images import decode_label, decode_png, encode_label, encode_png, load_image
from pipeline.formats.labels import BACKGROUND, agreement, encode_confidence
from pipeline.formats.objects import decode_objects
from pipeline.formats.shards import SampleStore, open_samples, write_tar
from pipeline.methods.bank import load_region_encoder
from pipeline.methods.dense import (
    DenseLabeller,
    PseudoLabelParams,
    check_synonyms,
    load_dense_labeller,
)
from pipeline.params.sections import BankParams
from pipeline.vocabulary.categories import Names

if TYPE_CHECKING:
    from pipeline.models.bank.labelling import BankLabeller

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
    bank_dir: Path | None = None,
    bank: BankParams | None = None,
    texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    executor: Executor | DryRun | None = None,
) -> None:
    """Write label shards: `label.png` and `confidence.png` under the keys of the mask shards.

    Labels depend on the image alone, not on its archive, and are cached by the image's SHA-256;
    with a region bank they depend on its pseudo-mask, too. The stats have the mean `agreement` of
    each category: the share of a mask that is labelled as it.

    Args:
        mask_dir: mask shards.
        out_dir: label shards, replaced as a whole.
        categories: names by label id; index 0 holds label id 1.
        background: names whose embeddings are averaged for label id 0.
        params: section `pseudo_label` of params.yaml.
        runtime: device, precision and cache.
        stats_path: counts of this run, JSON.
        bank_dir: the region bank, with `bank`.
        bank: section `bank`; without it labels are the labeller's own.
        texts: what stands for a category in prompts, see `Names`.
        executor: where shards are made; here by default.

    Raises:
        PipelineError: no samples; a damaged shard; masks made for another category list; an
            encoder that cannot be loaded; a bank of other settings; synonyms of what is no
            category.
    """
    names = Names(categories, background, texts)
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
        load=partial(
            LabelMaker,
            store,
            names,
            params,
            bank=None if bank is None or bank_dir is None else BankUse(bank_dir, bank),
        ),
        inputs=store.manifest,
        remedy="Run the mask stage again",
        cached=CacheUse(
            "pseudo_label",
            _settings(names, params, runtime),
            partial(_content_key, store, with_mask=bank is not None),
        ),
    )
    run_job(job, out_dir=out_dir, stats_path=stats_path, runtime=runtime, executor=executor)


class Photo(NamedTuple):
    """An image and, where labels depend on it, its pseudo-mask, as files."""

    jpeg: bytes
    mask_png: bytes


@dataclass(frozen=True)
class BankUse:
    """A region bank and the section `bank` that it was made by."""

    bank_dir: Path
    params: BankParams


class LabelMaker:
    """Makes shards of labels for the samples of mask shards: from the cache, or new.

    Args:
        store: the samples.
        names: what is told apart.
        params: section `pseudo_label`.
        runtime: device, precision and cache.
        bank: the region bank that has a part in the labels, if any.

    Attributes:
        settings: all that labels depend on besides their image; representable in JSON.
    """

    def __init__(
        self,
        store: SampleStore,
        names: Names,
        params: PseudoLabelParams,
        runtime: Runtime,
        *,
        bank: BankUse | None = None,
    ) -> None:
        self._labeller = load_dense_labeller(params, names, runtime)
        self.settings = _settings(names, params, runtime, self._labeller.settings)
        self._banked: BankLabeller | None = None
        if bank is not None:
            self._banked, self.settings["bank"] = _load_bank(
                bank, params, names, self._labeller, runtime
            )
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
            blobs = self._blobs([self._photo(number) for number in part], tally)
            shares = self._workers.map(
                self._agreement, zip(part, blobs, strict=True), ahead=len(part)
            )
            for number, blob, (category, share) in zip(part, blobs, shares, strict=True):
                label, confidence = _unpack(blob)
                if share is not None:
                    tally.measure(category, "agreement", share)
                yield {
                    "__key__": self._store.keys[number],
                    LABEL: label,
                    CONFIDENCE: confidence,
                }
                tally.advance()

    def _agreement(self, pair: tuple[int, bytes]) -> tuple[str, float | None]:
        """Category of a sample, and its share of the mask; none for negatives and empty masks."""
        number, blob = pair
        fields = self._store.json(number)
        if fields["label_id"] == BACKGROUND:
            return fields["category"], None
        try:
            mask = decode_png(self._store.member(number, "mask.png")) > 0
            share = agreement(mask, decode_label(_unpack(blob)[0]), fields["label_id"])
        except ValueError as error:
            raise PipelineError(
                f"sample {self._store.keys[number]}: its mask cannot be used: {error}; run "
                "`pipeline mask` again"
            ) from None
        return fields["category"], share

    def _photo(self, number: int) -> Photo:
        jpeg = self._store.member(number, "jpg")
        return Photo(jpeg, self._store.member(number, "mask.png") if self._banked else b"")

    def _blobs(self, photos: Sequence[Photo], tally: Tally) -> list[bytes]:
        """Label and confidence of each image, packed."""
        keys = [_key(photo) for photo in photos]
        known = {key: blob for key in keys if (blob := self._cache.get(key)) is not None}
        tally.count_in_run("cached", sum(key in known for key in keys))
        new = self._compute(
            {key: photo for key, photo in zip(keys, photos, strict=True) if key not in known}
        )
        for key, blob in new.items():
            self._cache.put(key, blob)
        self._cache.settle()
        blobs = known | new
        return [blobs[key] for key in keys]

    def _compute(self, photos: dict[str, Photo]) -> dict[str, bytes]:
        jpegs = [photo.jpeg for photo in photos.values()]
        decoded = self._workers.map(load_image, jpegs, ahead=len(jpegs))
        images = dict(zip(photos, decoded, strict=True))
        # While the network sees a batch, the workers encode the labels of the one before.
        blobs = {}
        for batch in equal_size_batches(
            images, self._batch_size, size_of=lambda key: images[key].size
        ):
            pixels = torch.stack([_to_tensor(images[key]) for key in batch])
            labels, confidence = self._label(pixels, [photos[key] for key in batch])
            maps = zip(labels.cpu().numpy(), confidence.cpu().numpy(), strict=True)
            for key, pair in zip(batch, maps, strict=True):
                blobs[key] = self._workers.submit(self._encode, pair)
        return {key: blob.result() for key, blob in blobs.items()}

    def _label(self, pixels: Tensor, photos: Sequence[Photo]) -> tuple[Tensor, Tensor]:
        """Label ids and confidence of images (B, 3, H, W)."""
        if self._banked is None:
            with self._runtime.autocast():
                return self._labeller.label(pixels.to(self._runtime.device))
        masks = [decode_objects(photo.mask_png) for photo in photos]
        return self._banked.label(
            pixels, masks, [sha256(photo.jpeg).hexdigest() for photo in photos]
        )

    def _encode(self, maps: tuple[np.ndarray, np.ndarray]) -> bytes:
        label, confidence = maps
        return _pack(
            encode_label(label, self._num_categories), encode_png(encode_confidence(confidence))
        )


def _settings(
    names: Names,
    params: PseudoLabelParams,
    runtime: Runtime,
    labeller: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """What labels depend on besides their image, those of the labeller where it is loaded."""
    return {
        "background": list(names.background),
        "categories": list(names.categories),
        "method": params.method,
        "encoder": params.encoder.model_dump(),
        **labeller,
        "precision": str(runtime.amp_dtype or torch.float32).removeprefix("torch."),
    }


def _key(photo: Photo) -> str:
    return sha256(photo.jpeg + photo.mask_png).hexdigest()


def _content_key(store: SampleStore, number: int, *, with_mask: bool) -> str:
    """The key of the labels of a sample."""
    mask = store.member(number, "mask.png") if with_mask else b""
    return _key(Photo(store.member(number, "jpg"), mask))


def _load_bank(
    bank: BankUse,
    params: PseudoLabelParams,
    names: Names,
    labeller: DenseLabeller,
    runtime: Runtime,
) -> tuple[BankLabeller, dict[str, Any]]:
    """The labeller with its bank, and the settings that this adds.

    Raises:
        PipelineError: there is no bank, or it was made with other settings.
    """
    from pipeline.models.bank.labelling import BankLabeller, RegionBank
    from pipeline.models.dense.labels import LOGIT_SCALE

    encoder = load_region_encoder(bank.params, params, names, runtime, labeller=labeller)
    stored = read_bank(bank.bank_dir)
    if stored.settings.get("regions") != encoder.settings:
        raise PipelineError(
            f"{bank.bank_dir}: made with other settings of `bank`, `pseudo_label` or `precision`; "
            "run `pipeline bank` again"
        )
    labels = BankLabeller(
        encoder,
        RegionBank(stored.images, stored.keys, stored.values),
        weight=bank.params.weight,
        nearest=bank.params.nearest,
        logit_scale=params.recipe().get("logit_scale", LOGIT_SCALE),
    )
    return labels, {
        "weight": bank.params.weight,
        "nearest": bank.params.nearest,
        "regions": encoder.settings,
        "shards": dict(stored.sha256),
    }


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
