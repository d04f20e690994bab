"""Write a source in a format: one image at a time, the whole folder or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline import __version__
from pipeline.engine.progress import Tally
from pipeline.errors import PipelineError
from pipeline.exporters.images import ImageFile, portable
from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.naming import UniqueNames, fit_stem
from pipeline.exporters.outputs import MANIFEST, TOOL
from pipeline.exporters.registry import find_format
from pipeline.exporters.sources import Found, Source
from pipeline.files import claim, replace_dir, utf8_text, write_json
from pipeline.formats.images import WORD_IGNORE, ImageError
from pipeline.formats.labels import IGNORE_INDEX, LabelMap

HASH_DIGITS = 8  # of 16; the share of the images that are for validation is exact to one in 4e9


def run(
    *,
    source: Source,
    format_name: str,
    out_dir: Path,
    min_score: float = 0.0,
    val_share: float | None = None,
) -> None:
    """Write a folder in a format, with `manifest.json`, which says what was exported from what.

    An image that cannot be read, is gone or has another size than its masks is left out, counted
    and listed. Names are unique without their suffixes and whatever their case. Which images are
    for validation is decided by their content: the same ones in every export.

    Args:
        source: the results.
        format_name: a key of `FORMATS`.
        out_dir: replaced as a whole when everything is done; see `check_folder`.
        min_score: objects that score less are left out.
        val_share: share of the images for validation; None for the format's own.

    Raises:
        PipelineError: an unknown format, one that cannot hold the categories, or no image can be
            read.
    """
    found_format = find_format(format_name)
    val_share = found_format.val_share if val_share is None else val_share
    with claim(out_dir), replace_dir(out_dir) as folder:
        exporter = found_format.load()(folder, source.categories)
        tally, files = Tally(), []
        names = UniqueNames()
        for entry in tqdm(source, desc="export", unit="image", dynamic_ncols=True, mininterval=0.5):
            try:
                found = entry.read()
                picture = portable(found.data, upright=found.upright)
                _check_sizes(found, picture)
            except ImageError as error:
                tally.skip(entry.source, str(error))
                continue
            image = ExportedImage(
                name=names.take(fit_stem(entry.stem)) + picture.suffix,
                data=picture.data,
                width=picture.width,
                height=picture.height,
                objects=_chosen(found.objects, min_score, tally),
                semantic=None if found.labels is None else _words(found.labels),
                split=split_of(found.content_hash, val_share),
                source=entry.source,
                facts={**found.facts, "sha256": found.content_hash},
                truth=found.truth,
            )
            exporter.add(image)
            files.append(_described(image))
            tally.count("objects", len(image.objects))
            tally.advance()
        _check_any(tally)
        # The folder still has another name, which a line or script must not keep.
        opened_by = exporter.finish().replace(str(folder), str(out_dir))
        counts = {**tally.counts, **getattr(exporter, "counts", {})}
        manifest = _manifest(source, tally, counts=counts, files=files)
        settings = {"format": format_name, "min_score": min_score, "split": val_share}
        settings["opened_by"] = utf8_text(opened_by, out_dir)
        write_json(folder / MANIFEST, {**_head(), **settings, **manifest})
    _say(out_dir, tally, counts, opened_by)


def split_of(content_hash: str, val_share: float) -> str:
    """`val` for so large a share of all hashes, given in hexadecimal, else `train`."""
    place = int(content_hash[:HASH_DIGITS], 16) / 16**HASH_DIGITS
    return "val" if place < val_share else "train"


def _check_sizes(found: Found, picture: ImageFile) -> None:
    """Refuse an image whose masks are of another size, as if it had changed since."""
    size = picture.height, picture.width
    maps: list[NDArray[Any]] = [item.mask for item in found.objects]
    maps += [] if found.labels is None else [found.labels]
    for shape in {array.shape for array in maps} - {size}:
        raise ImageError(
            f"is {picture.width}x{picture.height}, but its masks {shape[1]}x{shape[0]}: it has "
            "changed since"
        )


def _chosen(
    objects: Sequence[ExportedObject], min_score: float, tally: Tally
) -> list[ExportedObject]:
    """The objects that score enough, those of the highest score first."""
    kept = [item for item in objects if item.score is None or item.score >= min_score]
    if below := len(objects) - len(kept):
        tally.count("below_min_score", below)
    with_pixels = [item for item in kept if item.mask.any()]
    if empty := len(kept) - len(with_pixels):
        tally.count("empty_masks", empty)
    return sorted(with_pixels, key=lambda item: -(1.0 if item.score is None else item.score))


def _words(labels: LabelMap) -> NDArray[np.uint16]:
    """Label ids of 16 bits without a sign."""
    words = labels.astype(np.uint16)
    words[labels == IGNORE_INDEX] = WORD_IGNORE
    return words


def _described(image: ExportedImage) -> dict[str, Any]:
    """What the manifest says of an image."""
    return {
        "name": image.name,
        "source": image.source,
        "split": image.split,
        "objects": len(image.objects),
        "categories": sorted({item.category for item in image.objects}),
        **image.facts,
    }


def _check_any(tally: Tally) -> None:
    if not tally.items:
        first = tally.skipped[0] if tally.skipped else {"item": "none", "reason": "none is listed"}
        raise PipelineError(
            f"none of {len(tally.skipped)} images can be exported; the first one, "
            f"{first['item']}: {first['reason']}; run it in the folder where the predictions were "
            "made, and with the images where they were"
        )


def _head() -> dict[str, str]:
    return {"tool": TOOL, "version": __version__}


def _manifest(
    source: Source, tally: Tally, *, counts: Mapping[str, int], files: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    splits = Counter(file["split"] for file in files)
    return {
        "source": dict(source.origin),
        "categories": list(source.categories),
        "images": tally.items,
        "splits": dict(sorted(splits.items())),
        "counts": dict(sorted(counts.items())),
        "skipped": tally.skipped,
        "files": list(files),
    }


def _say(out_dir: Path, tally: Tally, counts: Mapping[str, int], opened_by: str) -> None:
    numbers = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    print(f"export: {tally.items} images, {len(tally.skipped)} skipped, {numbers}: {out_dir}")
    for entry in tally.skipped[:3]:
        print(f"  skipped {entry['item']}: {entry['reason']}")
    print(f"opened by {opened_by}")
