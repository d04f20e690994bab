"""Pictures of what the stages make of the demo's world, for the documentation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.files import write_bytes
from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import decode_png, load_image
from pipeline.formats.shards import SampleStore, open_samples
from pipeline.formats.tables import ArchiveRow, read_archives
from pipeline.pictures.overlays import grid
from pipeline.pictures.report import paint_labels

if TYPE_CHECKING:
    from pipeline.methods.students import TrainingData

ARCHIVES, PER_ARCHIVE = 5, 8
SAMPLES = 8
SIDE = 88
COLOURS = 96  # of a PNG; the drawings have few


def draw_archives(archives_path: Path, masks_dir: Path, out: Path) -> None:
    """One row a category, evenly spaced over the list: the first images of its archive.

    Raises:
        PipelineError: there are no archives or shards.
    """
    store = open_samples(masks_dir)
    ranked = _ranked(archives_path, store)
    chosen = [ranked[label_id] for label_id in _spread(sorted(ranked), ARCHIVES)]
    columns = min(PER_ARCHIVE, *map(len, chosen))
    pictures = [_image(store, index) for archive in chosen for index in archive[:columns]]
    _write(pictures, out, columns=columns)


def draw_labels(archives_path: Path, masks_dir: Path, labels_dir: Path, out: Path) -> None:
    """Three rows: the best image of some categories, its pseudo-mask, its dense labels.

    Raises:
        PipelineError: there are no archives or shards.
    """
    store, labels = open_samples(masks_dir), LabelStore(labels_dir)
    ranked = _ranked(archives_path, store)
    chosen = [(label_id, ranked[label_id][0]) for label_id in _spread(sorted(ranked), SAMPLES)]
    images = [np.asarray(load_image(store.member(index, "jpg"))) for _, index in chosen]
    masks = [
        (decode_png(store.member(index, "mask.png")) > 0) * label_id for label_id, index in chosen
    ]
    dense = [labels.get(store.keys[index])[0] for _, index in chosen]
    rows = [images, _painted(images, masks), _painted(images, dense)]
    _write([_scaled(picture) for row in rows for picture in row], out, columns=len(chosen))


def draw_training(data: TrainingData, out: Path) -> None:
    """Two rows: what training sees, composed by copy-paste, and its labels."""
    samples = [data[number] for number in range(SAMPLES)]
    images = [np.asarray(image) for image, _, _ in samples]
    painted = _painted(images, [np.asarray(labels) for _, labels, _ in samples])
    _write([_scaled(picture) for row in (images, painted) for picture in row], out, columns=SAMPLES)


def _ranked(archives_path: Path, store: SampleStore) -> dict[int, list[int]]:
    """Label id -> numbers of its samples in the shards, the most similar first; no negatives."""
    index_of = {key: index for index, key in enumerate(store.keys)}
    found: dict[int, list[tuple[int, int]]] = {}
    rows: Sequence[ArchiveRow] = read_archives(archives_path)
    for row in rows:
        index = index_of.get(f"{row.key}_{row.label_id}")
        if row.label_id > 0 and index is not None:
            found.setdefault(row.label_id, []).append((row.rank, index))
    if not found:
        raise PipelineError(
            f"{archives_path}: no image of it is in the mask shards; run `dvc repro`"
        )
    return {label_id: [index for _, index in sorted(places)] for label_id, places in found.items()}


def _spread(label_ids: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly spaced."""
    count = min(count, len(label_ids))
    return [label_ids[place * len(label_ids) // count] for place in range(count)]


def _painted(
    images: Sequence[NDArray[np.uint8]], labels: Sequence[NDArray[np.integer]]
) -> list[NDArray[np.uint8]]:
    return [paint_labels(image, values) for image, values in zip(images, labels, strict=True)]


def _image(store: SampleStore, index: int) -> Image.Image:
    return _scaled(np.asarray(load_image(store.member(index, "jpg"))))


def _scaled(image: NDArray[np.uint8]) -> Image.Image:
    """The image at a common width."""
    height = round(SIDE * image.shape[0] / image.shape[1])
    return Image.fromarray(image).resize((SIDE, height), Image.Resampling.LANCZOS)


def _write(pictures: Sequence[Image.Image], out: Path, *, columns: int) -> None:
    buffer = io.BytesIO()
    sheet = grid(pictures, columns=columns).quantize(COLOURS, dither=Image.Dither.NONE)
    sheet.save(buffer, "PNG", optimize=True)
    write_bytes(out, buffer.getvalue())
