"""SelfMask from scratch: a folder of images -> archive of all of them; their votes -> a network.

Between the two, the mask stage votes on the archive. Letters: B images, H W pixels.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.parallel import Workers, read_ahead
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.files import digest
from pipeline.formats.images import ImageError, load_image
from pipeline.formats.objects import decode_objects
from pipeline.formats.shards import SampleStore, open_samples
from pipeline.formats.sources import ImageRef, list_images, read_image
from pipeline.formats.tables import ArchiveRow, write_archives
from pipeline.methods.selfmask import SelfMaskTraining
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, save_selfmask
from pipeline.models.masks.selfmask_training import fit_selfmask
from pipeline.models.weights.weights import load_strict, read_weights
from pipeline.models.weights.zoo import resolve_weights
from pipeline.params.sources import SourceParams
from pipeline.training.copy_paste import make_canvas
from pipeline.training.transforms import Sample, draw_colour_change, draw_view

SOURCE, CATEGORY, LABEL_ID = "images", "anything", 1
MASK_MEMBERS = ("jpg", "mask.png", "json")

Example = tuple[np.ndarray, np.ndarray]


def list_pool(images_dir: Path, archives_path: Path, *, workers: int) -> None:
    """Write a table in which all images of a folder are one archive.

    What cannot be read is in it, too: the mask stage says why.

    Args:
        images_dir: folder of images.
        archives_path: table to write.
        workers: threads that read.

    Raises:
        PipelineError: there is no such folder, or no image in it.
    """
    found = list_images(SOURCE, SourceParams(root=images_dir), field="--images")
    with Workers(workers) as threads:
        rows = list(threads.map(_archive_row, enumerate(found, 1), ahead=workers))
    write_archives(archives_path, rows)


def new_network(params: SelfMaskTraining, runtime: Runtime) -> SelfMask:
    """SelfMask with random weights, of which those of its encoder may be given.

    Raises:
        PipelineError: settings that are no network, or weights that are missing or do not fit.
    """
    try:
        config = SelfMaskConfig(**params.network.model_dump())
    except ValueError as error:
        raise PipelineError(f"network: {error}") from None
    torch.manual_seed(runtime.seed)
    model = SelfMask(config)
    if params.initial:
        path = resolve_weights(params.initial, runtime.cache_dir)
        load_strict(model.encoder, read_weights(path), path)
    return model.to(runtime.device)


def run(
    *,
    model: SelfMask,
    masks_dir: Path,
    out_path: Path,
    work_dir: Path,
    params: SelfMaskTraining,
    runtime: Runtime,
) -> None:
    """Train SelfMask on the votes of mask shards; write its weights and the JSON beside them.

    A run of the same settings and shards that was cut off continues.

    Args:
        model: `new_network` of the params.
        masks_dir: mask shards; images whose mask is empty are left out.
        out_path: weights file (.safetensors).
        work_dir: folder of the resumable state.
        params: network and schedule.
        runtime: device, precision, seed and cache folder.

    Raises:
        PipelineError: damaged shards, or no mask but empty ones.
    """
    store = open_samples(masks_dir, members=MASK_MEMBERS)
    with Workers(params.votes.workers) as threads:
        shown = threads.map(
            partial(_shows_object, store, masks_dir), range(len(store)), ahead=params.batch_size
        )
        chosen = [index for index, is_shown in enumerate(shown) if is_shown]
        if not chosen:
            raise PipelineError(f"{masks_dir}: all of {len(store)} masks are empty; change `votes`")
        depends = [params.model_dump(mode="json"), store.manifest["shards"], runtime.seed]
        fit_selfmask(
            model,
            lambda step: read_ahead(_batches(store, chosen, threads, params, runtime.seed, step)),
            work_dir / f"state-{digest(depends)[:16]}.safetensors",
            iterations=params.iterations,
            learning_rate=params.learning_rate,
            title="SelfMask, training",
            autocast=runtime.autocast,
        )
    save_selfmask(model, out_path)


def _archive_row(numbered: tuple[int, ImageRef]) -> ArchiveRow:
    rank, image = numbered
    try:
        sha256 = hashlib.sha256(read_image(image)).hexdigest()
    except ImageError:
        sha256 = ""
    return ArchiveRow(
        category=CATEGORY,
        label_id=LABEL_ID,
        rank=rank,
        key=image.key,
        similarity=float("nan"),
        source=image.source,
        path=image.path,
        member=image.member,
        offset=image.offset,
        width=0,  # nobody has measured it yet
        height=0,
        sha256=sha256,
    )


def _shows_object(store: SampleStore, masks_dir: Path, index: int) -> bool:
    try:
        return bool(decode_objects(store.member(index, "mask.png")).any())
    except ImageError as error:
        raise PipelineError(f"{masks_dir}: sample {store.keys[index]}: {error}") from None


def _batches(
    store: SampleStore,
    chosen: list[int],
    threads: Workers,
    params: SelfMaskTraining,
    seed: int,
    start: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, S, S) in [0, 1] and masks (B, S, S) of each step from `start` on."""
    make = partial(_example, store, params)
    for step in range(start, params.iterations):
        rng = random.Random(f"{seed}/{step}")
        drawn = [(rng.choice(chosen), rng.random()) for _ in range(params.batch_size)]
        images, masks = zip(*threads.map(make, drawn, ahead=params.batch_size), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        yield pixels, torch.from_numpy(np.stack(masks))


def _example(store: SampleStore, params: SelfMaskTraining, drawn: tuple[int, float]) -> Example:
    """A crop (S, S, 3) uint8 of an image and (S, S) of its mask, which padding is no part of."""
    index, number = drawn
    rng = random.Random(f"{number}")
    image = load_image(store.member(index, "jpg"))
    mask = (decode_objects(store.member(index, "mask.png")) > 0).astype(np.uint8)
    view = draw_view(
        *mask.shape,
        scale_range=(params.scale_range[0], params.scale_range[1]),
        crop_size=params.crop_size,
        flip=params.flip,
        rng=rng,
    )
    change = draw_colour_change(
        jitter=params.colour_jitter, greyscale=params.greyscale, blur=params.blur, rng=rng
    )
    canvas = make_canvas(Sample(image, mask, mask), view, change)
    return canvas.image, canvas.semantic > 0
