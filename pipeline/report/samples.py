"""Pictures of the archives and of samples with their pseudo-masks and pseudo-labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats.dense_labels import LabelStore
from pipeline.formats.images import decode_png, load_image, resize_nearest
from pipeline.formats.shards import MANIFEST, SampleStore, open_samples
from pipeline.formats.tables import ArchiveRow
from pipeline.pictures.report import enlarge_image, fit_image, paint_labels, picture
from pipeline.report.inputs import integer

THUMBS_PER_ARCHIVE, THUMBS_IN_ALL, MAX_ARCHIVES = 10, 200, 100
NUM_SAMPLES, SPREAD_STEP = 12, 5
THUMB_SIDE, THUMB_BYTES = 192, 6_000
SAMPLE_SIDE, SAMPLE_BYTES = 288, 16_000

# Pseudo-mask, label id, dense labels, confidence -> labels that training saw.
TargetMaker = Callable[
    [NDArray[np.bool_], int, NDArray[np.integer], NDArray[np.floating]], NDArray[np.integer]
]
Place = tuple[ArchiveRow, int]


def read_samples(
    masks_dir: Path,
    labels_dir: Path,
    archives: Sequence[ArchiveRow],
    make_target: TargetMaker | None = None,
) -> dict[str, Any]:
    """Strips of the archives and overlays of a dozen samples.

    Args:
        masks_dir: mask shards.
        labels_dir: label shards, joined to them by key; without them, and for a mask of another
            size, there are no dense labels.
        archives: rows of the archives; those that are not in the shards are left out.
        make_target: makes what training saw; without it that picture is left out.

    Returns:
        `strips`, the negatives last, `num_hidden` archives, whether it `has_negatives`, `samples`,
        and the `label_ids` that occur in these; empty before there are shards.

    Raises:
        PipelineError: the shards are damaged.
    """
    if not archives or not (masks_dir / MANIFEST).is_file():
        return {}
    store = open_samples(masks_dir)
    labels = LabelStore(labels_dir) if (labels_dir / MANIFEST).is_file() else None
    index_of = {key: index for index, key in enumerate(store.keys)}
    found: dict[int, list[Place]] = {}
    for row in sorted(archives, key=lambda row: row.label_id == 0):
        index = index_of.get(f"{row.key}_{row.label_id}")
        if index is not None:
            found.setdefault(row.label_id, []).append((row, index))
    strips = [_strip(store, rows, len(found)) for rows in list(found.values())[:MAX_ARCHIVES]]
    samples = [
        _sample(store, labels, row, index, make_target) for row, index in _choose_places(found)
    ]
    return {
        "strips": strips,
        "num_hidden": len(found) - len(strips),
        "has_negatives": 0 in found,
        "samples": samples,
        "label_ids": sorted({value for sample in samples for value in sample["label_ids"]}),
    }


def _strip(store: SampleStore, rows: Sequence[Place], num_archives: int) -> dict[str, Any]:
    """The first images of one archive."""
    shown = min(THUMBS_PER_ARCHIVE, max(2, THUMBS_IN_ALL // num_archives))
    thumbs = []
    for row, index in rows[:shown]:
        image = _image(store, index, THUMB_SIDE)
        alt = f"{row.category or 'negative'}, rank {row.rank}"
        thumb = picture(image, alt=alt, max_bytes=THUMB_BYTES)
        thumbs.append(thumb | {"similarity": _similarity(row)})
    first = rows[0][0]
    return {
        "name": first.category if first.label_id else "negatives",
        "size": integer(len(rows)),
        "thumbs": thumbs,
    }


def _choose_places(found: Mapping[int, Sequence[Place]]) -> list[Place]:
    """A dozen samples, spread over categories and over ranks from first to last."""
    archives = [rows for label_id, rows in found.items() if label_id > 0]
    total = min(NUM_SAMPLES, sum(len(rows) for rows in archives))
    chosen: dict[tuple[int, int], Place] = {}
    for slot in range(total):
        rows = archives[slot * len(archives) // total % len(archives)]
        place = slot * SPREAD_STEP % total / max(1, total - 1)
        row, index = rows[round(place * (len(rows) - 1))]
        chosen[row.label_id, row.rank] = row, index
    return list(chosen.values())


def _sample(
    store: SampleStore,
    labels: LabelStore | None,
    row: ArchiveRow,
    index: int,
    make_target: TargetMaker | None,
) -> dict[str, Any]:
    """Image, pseudo-mask, dense labels and training target of one sample, as pictures."""
    image = _image(store, index, SAMPLE_SIDE)
    mask = decode_png(store.member(index, "mask.png")) > 0
    maps: dict[str, NDArray[np.integer]] = {"pseudo-mask": mask * row.label_id}
    if (dense := _dense_labels(labels, store.keys[index], mask.shape)) is not None:
        maps["dense labels"] = dense[0]
        if make_target is not None:
            maps["training saw"] = make_target(mask, row.label_id, *dense)
    pictures = {"image": picture(image, alt=f"Image of {row.category}", max_bytes=SAMPLE_BYTES)}
    for title, values in maps.items():
        painted = paint_labels(np.asarray(image), resize_nearest(values, image.size[::-1]))
        alt = f"{title} over the image of {row.category}"
        pictures[title] = picture(Image.fromarray(painted), alt=alt, max_bytes=SAMPLE_BYTES)
    return {
        "name": row.category,
        "rank": row.rank,
        "similarity": _similarity(row),
        "pictures": pictures,
        "label_ids": {int(value) for labels in maps.values() for value in np.unique(labels)},
    }


def _dense_labels(
    labels: LabelStore | None, key: str, shape: tuple[int, ...]
) -> tuple[NDArray[np.integer], NDArray[np.floating]] | None:
    """Dense labels (H, W) and confidence (H, W) of a mask of this shape; None where it has none.

    Labels of another shape are older than the mask, which has been made anew since.
    """
    if labels is None or key not in labels:
        return None
    dense_labels, confidence = labels.get(key)
    return (dense_labels, confidence) if dense_labels.shape == shape else None


def _similarity(row: ArchiveRow) -> str:
    """As shown; imported archives do not say theirs."""
    return "unknown" if math.isnan(row.similarity) else f"{row.similarity:.3f}"


def _image(store: SampleStore, index: int, side: int) -> Image.Image:
    return enlarge_image(fit_image(load_image(store.member(index, "jpg")), side), side)
