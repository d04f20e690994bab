"""Region bank: what regions of one's own images look like, and what CLIP takes them for.

Between mask and pseudo_label, and optional. Every image of the archives and of a sample of the
index is cut into the parts of its pseudo-mask and of what that leaves. A region's key is the unit
mean of the vision encoder's features inside, its value that of CLIP's dense features.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.benchmarks.opening import open_benchmark
from pipeline.engine.batching import equal_size_batches, slices
from pipeline.engine.cache import BlobCache
from pipeline.engine.dry_run import DryRun
from pipeline.engine.parallel import Workers
from pipeline.engine.progress import StageRun, Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Job, Load, run_job
from pipeline.errors import PipelineError
from pipeline.files import claim, file_sha256, refuse_url, replace_dir
from pipeline.formats.bank import ImageRegions, RegionRows, pack_rows, unpack_rows, write_regions
from pipeline.formats.images import load_image
from pipeline.formats.objects import decode_objects
from pipeline.formats.shards import (
    SampleStore,
    check_shards_replaceable,
    open_samples,
    shard_entry,
    shard_name,
    write_manifest,
)
from pipeline.formats.sources import image_name
from pipeline.formats.tables import (
    STATUS_OK,
    ArchiveRow,
    iter_embedding_rows,
    list_embedding_shards,
)
from pipeline.methods.bank import load_region_encoder
from pipeline.methods.dense import PseudoLabelParams
from pipeline.params.benches import BenchParams
from pipeline.params.sections import BankParams
from pipeline.vocabulary.categories import Names

MASK_MEMBERS = ("jpg", "mask.png", "json")
IMAGE_COLUMNS = ["key", "source", "path", "member", "offset", "width", "height", "sha256", "status"]
READ_ROWS = 16_384
BATCHES_AHEAD = 8
LISTED_IMAGES = 5


class MaskedImage(NamedTuple):
    """An image of the bank with its pseudo-mask, both as files."""

    source_sha256: str
    jpeg: bytes
    mask_png: bytes


def run(
    *,
    masks_dir: Path,
    embeddings_dir: Path,
    sources: Sequence[str],
    out_dir: Path,
    categories: Sequence[str],
    background: Sequence[str],
    benches: Mapping[str, BenchParams],
    load_masks: Load,
    params: BankParams,
    labeller: PseudoLabelParams,
    runtime: Runtime,
    stats_path: Path,
    texts: Mapping[str, Sequence[str]] = MappingProxyType({}),
    executor: Executor | DryRun | None = None,
) -> None:
    """Write the regions of the archive images and of a sample of the others, in Parquet shards.

    An image is known by its content, and has its regions once. The sample is of the images with the
    smallest SHA-256 that are in no archive. Regions are cached by image and mask. The stats count
    `regions`, `sampled` images, and those that `mask.max_components` leaves out of the sample as
    `many_components`.

    Args:
        masks_dir: mask shards of the archives.
        embeddings_dir: a folder of embedding shards a source, which list the index.
        sources: their names.
        out_dir: folder of shards, replaced as a whole.
        categories: names by label id from 1, and
        background: of label id 0, for the labeller, whose features they do not change.
        benches: entries of benchmarks, by their place in the params, none of whose images may be in
            the bank.
        load_masks: gives the maker of mask shards, for the sample; picklable.
        params: section `bank`.
        labeller: section `pseudo_label`.
        runtime: device, precision and cache.
        stats_path: counts of this run, JSON.
        texts: what stands for a category in prompts, see `Names`.
        executor: where shards are made; here by default.

    Raises:
        PipelineError: an image of a benchmark is among them, a benchmark cannot be read, there are
            no masks or embeddings, or a network cannot be loaded.
    """
    store = open_samples(masks_dir, members=MASK_MEMBERS)
    archived = _archived(store)
    sample = _sample_rows(embeddings_dir, sources, params.sample, archived)
    names = {digest: store.keys[number] for digest, number in archived.items()}
    names |= {row.sha256: image_name(row) for row in sample}
    _check_disjoint(names, benches, background)
    job = Job(
        "bank",
        [*archived.values(), *sample],
        shard_size=params.shard_size,
        load=partial(
            RegionMaker,
            store,
            load_masks if sample else None,
            Names(categories, background, texts),
            params,
            labeller,
        ),
        inputs=store.manifest,
        files=[row.path for row in sample],
        remedy="If the images have moved or changed, run `pipeline embed` again",
        suffix=".parquet",
    )
    run_job(job, out_dir=out_dir, stats_path=stats_path, runtime=runtime, executor=executor)


def write_empty(*, out_dir: Path, stats_path: Path) -> None:
    """Write a bank of nothing, for params without one; no network is loaded.

    Raises:
        PipelineError: `out_dir` holds something else, or another run is at work on it.
    """
    refuse_url(out_dir)
    check_shards_replaceable(out_dir)
    with (
        StageRun("bank", stats_path=stats_path, total=0),
        claim(out_dir),
        replace_dir(out_dir) as folder,
    ):
        write_manifest(folder, [])


class RegionMaker:
    """Makes shards of regions: from the cache, or new.

    Args:
        store: samples of the archives, of which items are numbers.
        load_masks: gives the maker of masks for the items that are rows of the index, if there are
            any.
        names: what the labeller is loaded with.
        params: section `bank`.
        labeller: section `pseudo_label`.
        runtime: device, precision and cache.

    Attributes:
        settings: all that regions depend on besides images and masks; representable in JSON.
    """

    def __init__(
        self,
        store: SampleStore,
        load_masks: Load | None,
        names: Names,
        params: BankParams,
        labeller: PseudoLabelParams,
        runtime: Runtime,
    ) -> None:
        self._store = store
        self._encoder = load_region_encoder(params, labeller, names, runtime)
        self._batch_size = params.batch_size
        self._cache = BlobCache(runtime.cache_dir / "bank", self._encoder.settings)
        self._workers = Workers(params.workers)
        self._masks = load_masks(runtime) if load_masks else None
        self.settings: dict[str, Any] = {
            "regions": self._encoder.settings,
            "sample_masks": self._masks.settings if self._masks else None,
        }

    def make(self, items: Sequence[int | ArchiveRow], path: Path, tally: Tally) -> int:
        """Write the regions of some images; returns their number."""
        numbers = [item for item in items if isinstance(item, int)]
        rows = [item for item in items if isinstance(item, ArchiveRow)]
        with ExitStack() as stack:
            samples = [(self._store, number) for number in numbers]
            if rows:
                folder = Path(stack.enter_context(TemporaryDirectory()))
                sampled = self._sampled(rows, folder, tally)
                samples += [(sampled, number) for number in range(len(sampled))]
                tally.count("sampled", len(sampled))
            return write_regions(path, self._regions(samples, tally))

    def close(self) -> None:
        """Let go of threads and caches."""
        self._workers.close()
        self._cache.close()
        if self._masks is not None:
            self._masks.close()

    def _sampled(self, rows: Sequence[ArchiveRow], folder: Path, tally: Tally) -> SampleStore:
        """The readable ones of some images of the index with their masks, as samples."""
        if self._masks is None:
            raise ValueError("images of the index, but nothing that makes masks")
        part = Tally()
        path = folder / shard_name(0)
        count = self._masks.make(rows, path, part)
        for entry in part.skipped:
            tally.skip(entry["item"], entry["reason"])
        if part.counts["many_components"]:
            tally.count("many_components", part.counts["many_components"])
        write_manifest(folder, [shard_entry(path, count)] if count else [])
        return open_samples(folder, members=MASK_MEMBERS)

    def _regions(
        self, samples: Sequence[tuple[SampleStore, int]], tally: Tally
    ) -> Iterator[ImageRegions]:
        for part in slices(samples, BATCHES_AHEAD * self._batch_size):
            images = [_masked_image(*sample) for sample in part]
            blobs = self._blobs({_cache_key(image): image for image in images}, tally)
            for image in images:
                rows = unpack_rows(blobs[_cache_key(image)])
                tally.advance()
                tally.count("regions", len(rows.shares))
                yield ImageRegions(sha256(image.jpeg).hexdigest(), image.source_sha256, rows)

    def _blobs(self, images: Mapping[str, MaskedImage], tally: Tally) -> dict[str, bytes]:
        """The packed regions of some images, by key."""
        known = {key: blob for key in images if (blob := self._cache.get(key)) is not None}
        tally.count_in_run("cached", len(known))
        new = self._compute({key: image for key, image in images.items() if key not in known})
        for key, blob in new.items():
            self._cache.put(key, blob)
        self._cache.settle()
        return known | new

    def _compute(self, images: Mapping[str, MaskedImage]) -> dict[str, bytes]:
        files = images.values()
        decoded = self._workers.map(load_image, (image.jpeg for image in files), ahead=len(images))
        photos = dict(zip(images, decoded, strict=True))
        blobs = {}
        for batch in equal_size_batches(
            photos, self._batch_size, size_of=lambda key: photos[key].size
        ):
            pixels = np.stack([np.asarray(photos[key]) for key in batch])
            tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            masks = [decode_objects(images[key].mask_png) for key in batch]
            found = self._encoder.regions(tensors, masks)
            for key, regions in zip(batch, found, strict=True):
                keys, values = (means.half().numpy() for means in (regions.keys, regions.values))
                blobs[key] = pack_rows(RegionRows(regions.shares, keys, values))
        return blobs


def _masked_image(store: SampleStore, number: int) -> MaskedImage:
    jpeg = store.member(number, "jpg")
    return MaskedImage(_source_sha256(store, number, jpeg), jpeg, store.member(number, "mask.png"))


def _source_sha256(store: SampleStore, number: int, jpeg: bytes | None = None) -> str:
    """SHA-256 of the file that a sample was made of, of its JPEG where no file is noted."""
    noted = store.json(number).get("sha256")
    return str(noted) if noted else sha256(jpeg or store.member(number, "jpg")).hexdigest()


def _cache_key(image: MaskedImage) -> str:
    return sha256(image.jpeg + image.mask_png).hexdigest()


def _archived(store: SampleStore) -> dict[str, int]:
    """Number of the first sample of each image, by SHA-256 of its source."""
    found: dict[str, int] = {}
    for number in range(len(store)):
        found.setdefault(_source_sha256(store, number), number)
    return found


def _sample_rows(
    embeddings_dir: Path, sources: Sequence[str], size: int, archived: Container[str]
) -> list[ArchiveRow]:
    """The images of the index with the smallest SHA-256, each once, without those of archives."""
    if size == 0:
        return []
    shards = list_embedding_shards([embeddings_dir / name for name in sources])
    rows = (
        row
        for block in iter_embedding_rows(shards, columns=IMAGE_COLUMNS, block_rows=READ_ROWS)
        for row in block.to_pylist()
        if row["status"] == STATUS_OK and row["sha256"] not in archived
    )
    return [_archive_row(rank, row) for rank, row in enumerate(_smallest(rows, size), start=1)]


def _smallest(rows: Iterable[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The rows of the `size` smallest hashes; of equal ones that of the smallest key."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        other = found.get(row["sha256"])
        if other is None or row["key"] < other["key"]:
            found[row["sha256"]] = row
        if len(found) > 2 * size:
            found = {digest: found[digest] for digest in heapq.nsmallest(size, found)}
    return [found[digest] for digest in heapq.nsmallest(size, found)]


def _archive_row(rank: int, row: Mapping[str, Any]) -> ArchiveRow:
    """An image of the index as of an archive without a category."""
    place = {name: row[name] for name in IMAGE_COLUMNS if name != "status"}
    return ArchiveRow(category="", label_id=1, rank=rank, similarity=float("nan"), **place)


def _check_disjoint(
    names: Mapping[str, str], benches: Mapping[str, BenchParams], background: Sequence[str]
) -> None:
    """Refuse images, names by SHA-256, that are those of a benchmark."""
    found: dict[str, str] = {}
    for field, bench in benches.items():
        for example in open_benchmark(field, bench, background, field=field):
            if (digest := file_sha256(example.image_path)) in names:
                found.setdefault(digest, f"{names[digest]} ({field}: {example.image_path})")
    if found:
        listed = ", ".join(list(found.values())[:LISTED_IMAGES])
        more = f", and {len(found) - LISTED_IMAGES} more" if len(found) > LISTED_IMAGES else ""
        raise PipelineError(
            f"bank: {len(found)} of its images are of a benchmark, which would score what it has "
            f"taught: {listed}{more}; take them out of the index, run embed, retrieve and mask "
            "again, or set `bank: null`"
        )
