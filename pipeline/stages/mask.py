"""Stage 3: archives -> shards of images with pseudo-masks.

Every image is masked once, by SelfMask or by spectral voting, and optionally snapped to its edges
by the bilateral solver. Masks are cached by the image's hash, so a larger k masks new images only.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.cache import BlobCache
from pipeline.data.images import (
    ImageError,
    decode_png,
    encode_jpeg,
    encode_png,
    is_plain_jpeg,
    load_image,
    shrink_short_side,
)
from pipeline.data.shards import write_tar
from pipeline.data.sources import image_name, read_image
from pipeline.data.tables import ArchiveRow, read_archives
from pipeline.errors import PipelineError
from pipeline.files import file_sha256, file_versions
from pipeline.models.bilateral import MAX_STEPS, bilateral_solve
from pipeline.models.clip import ClipEncoder, load_clip
from pipeline.models.dino import DINO_MODELS, DinoEncoder, load_dino
from pipeline.models.selfmask import load_selfmask
from pipeline.models.spectral import spectral_mask
from pipeline.models.zoo import resolve_weights
from pipeline.parallel import Workers
from pipeline.params import EncoderParams, MaskParams
from pipeline.runtime import Runtime, StageRun, Tally
from pipeline.shard_run import Executor, LocalExecutor, plan_key, run_shards, slices

# Raise it when masks change though their settings do not: it keeps old ones out of the cache.
MASK_VERSION = 1
NEGATIVE_LABEL_ID = 0
BATCHES_IN_MEMORY = 4
# Bounds on what one image may cost: attention and the affinity matrix are quadratic in its area.
MAX_SELFMASK_TOKENS = 16_384
MAX_SPECTRAL_POSITIONS = 6_144
POSITIONS_PER_PATCH = 4


@dataclass(frozen=True)
class Masker:
    """A way to make masks.

    Attributes:
        settings: all that its masks depend on besides the image; representable in JSON.
        max_pixels: larger images are shrunk for it, and the masks enlarged again.
        predict: images (B, 3, H, W) in [0, 1] -> mask probabilities (B, H, W), on the CPU.
        threshold: a pixel belongs to the mask where its probability exceeds this.
    """

    settings: dict[str, Any]
    max_pixels: int
    predict: Callable[[Tensor], Tensor]
    threshold: float


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


def run(
    *,
    archives_path: Path,
    out_dir: Path,
    params: MaskParams,
    runtime: Runtime,
    stats_path: Path,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Write one sample for each archive image: `jpg`, `mask.png` (0 and 255) and `json`.

    Images that cannot be read, or have changed since they were embedded, are skipped and listed.
    Images of archive 0, the negatives, get an empty mask. The stats count `masked` (computed now),
    `cached` (known from an earlier run or archive), `negatives`, and `empty_masks`.

    Args:
        archives_path: table of stage 2.
        out_dir: folder of shards, replaced as a whole.
        params: section `mask`.
        runtime: device, seed and cache folder.
        stats_path: JSON of counts.
        executor: where shards are made; here by default.

    Returns:
        The manifest of the shards.

    Raises:
        PipelineError: no archives or weights, or none or too few of the images can be read.
    """
    rows = read_archives(archives_path)
    if not rows:
        raise PipelineError(f"{archives_path}: no images; run `pipeline retrieve` again")
    recipe = partial(MaskMaker, params)
    maker = recipe(runtime)
    with StageRun(
        "mask", stats_path=stats_path, total=len(rows), max_error_rate=params.max_error_rate
    ) as stage:
        return run_shards(
            out_dir,
            slices(rows, params.shard_size),
            key=plan_key(
                [maker.settings, params.shard_size],
                chain(rows, file_versions(row.path for row in rows)),
            ),
            recipe=recipe,
            maker=maker,
            executor=executor or LocalExecutor(),
            stage=stage,
            settings={"mask": maker.settings},
            remedy="If the images have moved or changed, run `pipeline embed` again",
        )


def make_masker(params: MaskParams, runtime: Runtime) -> Masker:
    """Load the network that `params.source` asks for."""
    if params.source == "selfmask":
        return _selfmask_masker(params, runtime)
    return _spectral_masker(params, runtime)


def _selfmask_masker(params: MaskParams, runtime: Runtime) -> Masker:
    weights = resolve_weights(params.weights, runtime.cache_dir)
    model = load_selfmask(weights, runtime.device)

    def predict(images: Tensor) -> Tensor:
        with runtime.autocast():
            return model.saliency(images.to(runtime.device)).cpu()

    return Masker(
        settings={
            "source": "selfmask",
            "weights": file_sha256(weights),
            "architecture": asdict(model.config),
            "threshold": params.threshold,
            "precision": str(runtime.amp_dtype),
        },
        max_pixels=MAX_SELFMASK_TOKENS * model.config.patch_size**2,
        predict=predict,
        threshold=params.threshold,
    )


def _spectral_masker(params: MaskParams, runtime: Runtime) -> Masker:
    encoder = _load_patch_encoder(params.encoder, runtime)
    patch = encoder.patch_size

    def predict(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        with runtime.autocast():
            features = encoder.patch_features(images.to(runtime.device), facet=params.facet)
        masks = [
            spectral_mask(
                [feature_map],
                size=(height, width),
                padded_size=(math.ceil(height / patch) * patch, math.ceil(width / patch) * patch),
                clusters=params.clusters,
                seed=runtime.seed,
            )
            for feature_map in features.float().cpu()
        ]
        return torch.from_numpy(np.stack(masks)).float()

    return Masker(
        settings={
            "source": "spectral",
            "encoder": encoder.fingerprint(),
            "facet": params.facet,
            "clusters": list(params.clusters),
            "seed": runtime.seed,
            "precision": str(runtime.amp_dtype),
        },
        max_pixels=MAX_SPECTRAL_POSITIONS // POSITIONS_PER_PATCH * patch**2,
        predict=predict,
        threshold=0.5,
    )


def _load_patch_encoder(params: EncoderParams, runtime: Runtime) -> ClipEncoder | DinoEncoder:
    load = load_dino if params.model in DINO_MODELS else load_clip
    return load(params.model, params.pretrained, runtime.device, cache_dir=runtime.cache_dir)


class MaskMaker:
    """Makes shards of images and masks: the masks from the cache by the image's hash, or new.

    Args:
        params: section `mask`.
        runtime: device, seed and cache folder.

    Attributes:
        settings: all that a mask depends on besides its image; representable in JSON.
    """

    def __init__(self, params: MaskParams, runtime: Runtime) -> None:
        self._params = params
        self._masker = make_masker(params, runtime)
        self.settings = {
            "version": MASK_VERSION,
            **self._masker.settings,
            "refine": params.refine,
            "solver_iterations": params.solver_iterations,
            "solver_scale": params.solver_scale,
            "short_side": params.short_side,
        }
        self._cache = BlobCache(runtime.cache_dir / "masks", self.settings)
        self._workers = Workers(params.workers)

    def make(self, items: Sequence[ArchiveRow], path: Path, tally: Tally) -> int:
        """Write the sample of every readable row, a few batches in memory at a time."""
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
                    mask_png = masks[photo.row.sha256]
                    tally.count("empty_masks", int(not decode_png(mask_png).any()))
                yield _sample(photo, mask_png)
                tally.advance()

    def _masks(self, photos: Sequence[Photo], tally: Tally) -> dict[str, bytes]:
        """PNG files of the masks of some images, by hash."""
        images = {photo.row.sha256: photo.image for photo in photos}
        known = {key: mask for key in images if (mask := self._cache.get(key)) is not None}
        unknown = {key: image for key, image in images.items() if key not in known}
        tally.count("masked", len(unknown))
        tally.count("cached", len(photos) - len(unknown))
        # While the network sees a batch, the workers refine the masks of the one before.
        files = {}
        for batch in _equal_size_batches(unknown, self._params.batch_size):
            coarse = coarse_masks([unknown[key] for key in batch], masker=self._masker)
            for key, mask in zip(batch, coarse, strict=True):
                files[key] = self._workers.submit(self._file, (unknown[key], mask))
        new = {key: file.result() for key, file in files.items()}
        for key, mask_png in new.items():
            self._cache.put(key, mask_png)
        self._cache.settle()
        return known | new

    def _file(self, pair: tuple[Image.Image, NDArray[np.bool_]]) -> bytes:
        image, mask = pair
        if self._params.refine:
            mask = refine_mask(
                image,
                mask,
                solver_iterations=self._params.solver_iterations,
                solver_scale=self._params.solver_scale,
            )
        return encode_png(mask)


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


def _equal_size_batches(images: dict[str, Image.Image], batch_size: int) -> Iterator[list[str]]:
    """Keys of images in batches whose members have the same size."""
    keys_of_size: dict[tuple[int, int], list[str]] = defaultdict(list)
    for key, image in images.items():
        keys_of_size[image.size].append(key)
    for keys in keys_of_size.values():
        for start in range(0, len(keys), batch_size):
            yield keys[start : start + batch_size]


def coarse_masks(images: Sequence[Image.Image], *, masker: Masker) -> NDArray[np.bool_]:
    """Masks (B, H, W) of B RGB images of one size (W, H), as the network has them."""
    pixels = np.stack([np.asarray(image) for image in images])
    height, width = pixels.shape[1:3]
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    shrink = math.sqrt(masker.max_pixels / (height * width))
    if shrink < 1:
        smaller = (max(1, int(height * shrink)), max(1, int(width * shrink)))
        tensors = F.interpolate(tensors, smaller, mode="bilinear", antialias=True)
    probs = masker.predict(tensors)
    if shrink < 1:
        probs = F.interpolate(probs[:, None], (height, width), mode="bilinear")[:, 0]
    return (probs > masker.threshold).numpy()


def refine_mask(
    image: Image.Image,
    mask: NDArray[np.bool_],
    *,
    solver_iterations: int = MAX_STEPS,
    solver_scale: float = 1.0,
) -> NDArray[np.bool_]:
    """Snap a mask (H, W) to the edges of its RGB image by the bilateral solver.

    An empty mask stays empty.

    Args:
        image: of the size of the mask.
        mask: a coarse one.
        solver_iterations: bound on the solver's steps.
        solver_scale: at which fraction of the size it runs.
    """
    if not mask.any():
        return mask
    pixels = np.asarray(image)
    return bilateral_solve(pixels, mask, max_steps=solver_iterations, scale=solver_scale) > 0.5


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
