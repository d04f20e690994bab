"""Stage 3: archives -> shards of images with pseudo-masks.

Every image is masked once, by the source of section `mask`, and optionally snapped to its edges
by the bilateral solver. Masks are cached by the image's hash, so a larger k masks new images only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from pipeline.engine.batching import equal_size_batches
from pipeline.engine.cache import BlobCache
from pipeline.engine.dry_run import CacheUse, DryRun
from pipeline.engine.parallel import Workers
from pipeline.engine.progress import StageRun, Tally
from pipeline.engine.runtime import Runtime
from pipeline.engine.shard_run import Executor, Job, run_job
from pipeline.errors import PipelineError, listing
from pipeline.files import digest
from pipeline.formats.images import (
    ImageError,
    decode_png,
    encode_jpeg,
    encode_png,
    is_plain_jpeg,
    load_image,
    shrink_short_side,
)
from pipeline.formats.objects import encode_objects
from pipeline.formats.shards import write_tar
from pipeline.formats.sources import image_name, read_image
from pipeline.formats.tables import ArchiveRow, read_archives
from pipeline.methods.masks import MaskParams, load_mask_learner, load_mask_source
from pipeline.models.masks.making import coarse_objects, refine_mask
from pipeline.models.masks.threads import single_threaded

# Raise it when masks change though their settings do not: it keeps old ones out of the cache.
MASK_VERSION = 1
NEGATIVE_LABEL_ID = 0
BATCHES_IN_MEMORY = 4
KEPT = "kept"
SPECK = 0.01


@dataclass(frozen=True)
class Photo:
    """An archive image as it goes into a shard.

    Attributes:
        row: its place in the archives.
        image: RGB, upright, short side limited.
        jpeg: the same as a file.
    """

    row: ArchiveRow
    image: Image.Image
    jpeg: bytes


class MaskFile(NamedTuple):
    """The masks of an image as a PNG file, and how many components they have; 0: all are empty."""

    png: bytes
    num_components: int

    @classmethod
    def of(cls, png: bytes) -> MaskFile:
        """Count the components of a file's mask."""
        return cls(png, num_components(decode_png(png) > 0))


def run(
    *,
    archives_path: Path,
    out_dir: Path,
    params: MaskParams,
    runtime: Runtime,
    stats_path: Path,
    executor: Executor | DryRun | None = None,
    section: str | None = None,
) -> dict[str, Any]:
    """Write one sample for each archive image: `jpg`, `mask.png` and `json`.

    The mask is 0 and 255, or has the numbers of several objects (`pipeline.formats.objects`).

    Images that cannot be read, or have changed since they were embedded, are skipped and listed.
    Images of archive 0, the negatives, get an empty mask. The stats count `masked` (computed now),
    `cached` (known from an earlier run or archive), `negatives`, `empty_masks` and, with
    `max_components`, those left out as `many_components`; for each category they have the mean
    number of components and the share that is `kept`.

    Args:
        archives_path: table of stage 2.
        out_dir: folder of shards, replaced as a whole.
        params: section `mask`.
        runtime: device, seed and cache folder.
        stats_path: JSON of counts.
        executor: where shards are made; here by default.
        section: what messages call the params, if not `mask`.

    Returns:
        The manifest of the shards.

    Raises:
        PipelineError: no archives or weights, none or too few of the images can be read, or
            `max_components` leaves none.
    """
    rows = read_archives(archives_path)
    if not rows:
        raise PipelineError(f"{archives_path}: no images; run `pipeline retrieve` again")
    learned = None if isinstance(executor, DryRun) else _learned(rows, params, runtime)
    job = Job(
        "mask",
        rows,
        shard_size=params.shard_size,
        load=partial(MaskMaker, params, learned=learned),
        files=[row.path for row in rows],
        remedy="If the images have moved or changed, run `pipeline embed` again",
        max_error_rate=params.max_error_rate,
        section=section,
        review=partial(_review, params, section or "mask"),
        cached=CacheUse("masks", _settings(params), _content_key),
    )
    return run_job(job, out_dir=out_dir, stats_path=stats_path, runtime=runtime, executor=executor)


def _review(params: MaskParams, section: str, stage: StageRun) -> None:
    """Warn of masks that are mostly empty, and of what `max_components` leaves out."""
    num_masks = stage.items - stage.counts["negatives"]
    num_empty = stage.counts["empty_masks"]
    if num_empty > num_masks / 2:
        stage.warn(
            f"{num_empty} of {num_masks} masks are empty, and training leaves their images out: "
            f"{section}.source: {params.source} finds nothing there; try another source, facet or "
            "encoder"
        )
    if params.max_components is not None:
        _review_components(f"{section}.max_components: {params.max_components}", stage)


def _review_components(field: str, stage: StageRun) -> None:
    """Say what `max_components` takes from the archives; refuse to go on if that is everything."""
    numbers = {name: stage.measured(name, KEPT) for name in sorted(stage.measures)}
    if numbers and not any(left for _, left in numbers.values()):
        total = sum(count for count, _ in numbers.values())
        raise PipelineError(f"params.yaml: {field} leaves none of {total} images; raise it")
    short = [
        f"{name} {left:.0f} of {count}" for name, (count, left) in numbers.items() if left < count
    ]
    if short:
        stage.warn(f"{field} leaves fewer images: {listing(short)}; raise it to keep more")


class MaskMaker:
    """Makes shards of images and masks: the masks from the cache by the image's hash, or new.

    Args:
        params: section `mask`.
        runtime: device, seed and cache folder.
        learned: see `load_mask_source`.

    Attributes:
        settings: all that the samples depend on besides their images; representable in JSON.
    """

    def __init__(
        self, params: MaskParams, runtime: Runtime, *, learned: bytes | None = None
    ) -> None:
        self._params = params
        self._source = load_mask_source(params, runtime, learned)
        self.settings = _settings(params, self._source.settings)
        self._cache = BlobCache(runtime.cache_dir / "masks", self.settings)
        if params.max_components is not None:
            self.settings = {**self.settings, "max_components": params.max_components}
        self._workers = Workers(params.workers)

    def make(self, items: Sequence[ArchiveRow], path: Path, tally: Tally) -> int:
        """Write the sample of every readable row, a few batches in memory at a time."""
        with single_threaded("blas"):
            return write_tar(path, self._samples(items, tally))

    def close(self) -> None:
        """Let go of threads and cache."""
        self._workers.close()
        self._cache.close()

    def _samples(self, rows: Sequence[ArchiveRow], tally: Tally) -> Iterator[dict[str, Any]]:
        chunk_size = BATCHES_IN_MEMORY * self._params.batch_size
        read = partial(_read_photo, params=self._params)
        photos = _readable(rows, self._workers.map(read, rows, ahead=chunk_size), tally)
        while chunk := list(islice(photos, chunk_size)):
            masks = self._masks(
                [photo for photo in chunk if photo.row.label_id != NEGATIVE_LABEL_ID], tally
            )
            for photo in chunk:
                if photo.row.label_id == NEGATIVE_LABEL_ID:
                    mask_png = encode_png(np.zeros(photo.image.size[::-1], dtype=bool))
                    tally.count("negatives")
                else:
                    mask_png, num_components = masks[photo.row.sha256]
                    if not self._is_kept(photo.row.category, num_components, tally):
                        continue
                    tally.count("empty_masks", int(not num_components))
                yield _sample(photo, mask_png)
                tally.advance()

    def _is_kept(self, category: str, num_components: int, tally: Tally) -> bool:
        """Whether a mask is in few enough parts; measures them, and counts it if not."""
        tally.measure(category, "components", num_components)
        most = self._params.max_components
        if most is None:
            return True
        is_kept = num_components <= most
        tally.measure(category, KEPT, int(is_kept))
        tally.count("many_components", int(not is_kept))
        return is_kept

    def _masks(self, photos: Sequence[Photo], tally: Tally) -> dict[str, MaskFile]:
        """The masks of some images, by hash."""
        images = {photo.row.sha256: photo.image for photo in photos}
        known = {
            key: MaskFile.of(mask_png)
            for key in images
            if (mask_png := self._cache.get(key)) is not None
        }
        unknown = {key: image for key, image in images.items() if key not in known}
        tally.count_in_run("masked", len(unknown))
        tally.count_in_run("cached", len(photos) - len(unknown))
        # While the network sees a batch, the workers refine the masks of the one before.
        files = {}
        for batch in equal_size_batches(
            unknown, self._params.batch_size, size_of=lambda key: unknown[key].size
        ):
            coarse = coarse_objects([unknown[key] for key in batch], source=self._source)
            for key, masks in zip(batch, coarse, strict=True):
                files[key] = self._workers.submit(self._file, (unknown[key], masks))
        new = {key: file.result() for key, file in files.items()}
        for key, file in new.items():
            self._cache.put(key, file.png)
        self._cache.settle()
        return known | new

    def _file(self, pair: tuple[Image.Image, NDArray[np.bool_]]) -> MaskFile:
        image, masks = pair
        if self._params.refine:
            refine = partial(
                refine_mask,
                image,
                solver_iterations=self._params.solver_iterations,
                solver_scale=self._params.solver_scale,
            )
            masks = np.stack([refine(mask) for mask in masks])
        return MaskFile.of(encode_objects(masks))


def _settings(
    params: MaskParams, source: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What masks depend on besides their image, that of the source where it is loaded."""
    return {
        "version": MASK_VERSION,
        **source,
        "refine": params.refine,
        "solver_iterations": params.solver_iterations,
        "solver_scale": params.solver_scale,
        "short_side": params.short_side,
    }


def _content_key(row: ArchiveRow) -> str | None:
    """The key of an image's mask; None for a negative, whose mask is empty."""
    return None if row.label_id == NEGATIVE_LABEL_ID else row.sha256


def _learned(rows: Sequence[ArchiveRow], params: MaskParams, runtime: Runtime) -> bytes | None:
    """What the source learns from the archives first, from the cache or new; None: nothing."""
    learner = load_mask_learner(params, runtime)
    if learner is None:
        return None
    images = {row.sha256: row for row in rows if row.label_id != NEGATIVE_LABEL_ID}
    # By hash, which is no order at all: the same images whatever their ranks.
    chosen = [images[key] for key in sorted(images)[: learner.num_images]]

    def photos(of: str) -> Iterator[Photo]:
        read = (_read_photo(row, params) for row in tqdm(chosen, desc=f"mask, {of}"))
        return (photo for photo in read if isinstance(photo, Photo))

    with BlobCache(runtime.cache_dir / "mask_learner", learner.settings) as cache:
        # Of what can be read today: a broken image teaches nothing.
        key = digest([photo.row.sha256 for photo in photos("looking")])
        learned = cache.get(key)
        if learned is None:
            learned = learner.learn(photo.image for photo in photos("learning"))
            cache.put(key, learned)
    return learned


def num_components(mask: NDArray[np.bool_]) -> int:
    """Connected components of a mask (H, W), pixels connected to their four neighbours.

    Specks below 1 % of the mask do not count, unless it is made of nothing else.
    """
    components, count = ndimage.label(mask)
    areas = np.bincount(components.ravel())[1:]
    return int(np.count_nonzero(areas >= SPECK * areas.sum())) or int(count)


def _read_photo(row: ArchiveRow, params: MaskParams) -> Photo | ImageError:
    """Read and shrink one image, or say why it is to be skipped."""
    try:
        data = read_image(row)
        if hashlib.sha256(data).hexdigest() != row.sha256:
            raise ImageError("changed since it was embedded")
        full = load_image(data, max_pixels=params.max_pixels)
    except ImageError as error:
        return error
    image = shrink_short_side(full, params.short_side)
    jpeg = data if is_plain_jpeg(data, image) else encode_jpeg(image)
    return Photo(row=row, image=image, jpeg=jpeg)


def _readable(
    rows: Sequence[ArchiveRow], photos: Iterable[Photo | ImageError], tally: Tally
) -> Iterator[Photo]:
    """The photos; what could not be read is counted and left out."""
    for row, photo in zip(rows, photos, strict=True):
        if isinstance(photo, Photo):
            yield photo
        else:
            tally.skip(image_name(row), str(photo))


def _sample(photo: Photo, mask_png: bytes) -> dict[str, Any]:
    row = photo.row
    return {
        "__key__": f"{row.key}_{row.label_id}",
        "jpg": photo.jpeg,
        "mask.png": mask_png,
        "json": {
            "category": row.category,
            "label_id": row.label_id,
            "rank": row.rank,
            "similarity": None if math.isnan(row.similarity) else row.similarity,
            "key": row.key,
            "source": row.source,
            "path": row.path,
            "member": row.member,
            "sha256": row.sha256,
            "original_width": row.width,
            "original_height": row.height,
        },
    }
