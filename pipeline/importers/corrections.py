"""Masks that a person has corrected in another tool -> truth to train on, or a benchmark."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.benchmarks.voc import SPLITS, VOID, WRITTEN, VocWriter
from pipeline.engine.progress import StageRun
from pipeline.errors import PipelineError, counted, listing
from pipeline.files import check_replaceable, replace_dir
from pipeline.formats.corrections import (
    BACKGROUND_NAME,
    CorrectedObject,
    Correction,
    Corrections,
    write_corrections,
)
from pipeline.formats.labels import IGNORE_INDEX
from pipeline.formats.rle import Rle, decode_mask, encode_mask
from pipeline.importers.corrected_images import (
    ArchiveImages,
    Found,
    ImageFolder,
    Photo,
    UnusableError,
)
from pipeline.importers.tool_files import ToolImage, read_tool_file
from pipeline.vocabulary.categories import Names, plain_name

VOID_NAMES = ("void", "ignore")  # an object of these names is none, unless they are categories
SPLIT = "val"
SPLIT_FILE = f"{SPLIT}.txt"
ID = re.compile(r"[^0-9A-Za-z_-]+")
ID_DIGITS = 8


def run(
    *,
    path: Path,
    images_dir: Path | None,
    masks_dir: Path,
    out_dir: Path,
    names: Names,
    stats_path: Path,
    force: bool = False,
    skip_empty: bool = False,
) -> None:
    """Add the corrected images of a file to a folder of corrections, for images of the archives.

    An image of the file without an object shows no category. One that cannot be used is skipped and
    listed: it is not of the archives, or several have its name; its masks are of another size than
    the image, whole or as the mask stage shrank it; it has objects of unknown names only; or it has
    another correction already. Beside other objects, those of unknown names are kept, and void to
    training.

    Args:
        path: COCO's JSON or Label Studio's.
        images_dir: the images that were corrected; None: names tell.
        masks_dir: mask shards, which say what the archives' images are.
        out_dir: folder of the corrections.
        names: categories, and names of what is none.
        stats_path: JSON file of the counts. `new`, `replaced`, `unchanged`; `negatives`: those
            without an object; `objects`, `unknown_objects`.
        force: replace other corrections of the same images.
        skip_empty: skip images without an object.

    Raises:
        PipelineError: a damaged file, or none of its images can be used.
    """
    images = read_tool_file(path)
    archives, known = ArchiveImages(masks_dir, images_dir), Corrections(out_dir)
    reader = _Reader(names, skip_empty=skip_empty)
    taken: dict[str, Correction] = {}
    with StageRun("import corrections", stats_path=stats_path, total=len(images)) as stage:
        for image in images:
            try:
                found = archives.find(image)
                if found.sha256 in taken:
                    raise UnusableError(f"is {taken[found.sha256].name} once more")
                correction = reader.correction(image, found)
                before = known.get(found.sha256)
                if before not in (None, correction) and not force:
                    raise UnusableError("has another correction already; --force replaces it")
            except UnusableError as error:
                stage.skip(image.names[0], str(error))
                continue
            taken[found.sha256] = correction
            stage.count(_change(before, correction))
            stage.count("negatives", correction.is_empty)
            stage.count("objects", len(correction.objects))
            stage.advance()
        _check_any(path, stage)
        reader.report(stage)
        write_corrections(out_dir, taken.values())


def write_benchmark(
    *,
    path: Path,
    images_dir: Path,
    corrections_dir: Path,
    out_dir: Path,
    names: Names,
    stats_path: Path,
    skip_empty: bool = False,
) -> None:
    """Write the corrected images of a file as a benchmark in VOC's layout, split `val`.

    Images that are no plain JPEG become one. Void and objects of unknown names are not scored. For
    what is skipped see `run`.

    Args:
        path: COCO's JSON or Label Studio's.
        images_dir: the images that were corrected.
        corrections_dir: those that training learns from, which a benchmark should have none of.
        out_dir: folder of the benchmark, replaced whole.
        names: categories by label id, and names of what is none.
        stats_path: JSON file of the counts. `objects`, `unknown_objects`, `reencoded`: images that
            became JPEGs; `trained_on`: images that training learns from.
        skip_empty: skip images without an object.

    Raises:
        PipelineError: `out_dir` holds something else, a damaged file, none of its images can be
            used, or VOC's layout has no room for so many categories.
    """
    check_replaceable(out_dir, WRITTEN, needed=f"{SPLITS}/{SPLIT_FILE}")
    check_replaceable(out_dir / SPLITS, re.compile(re.escape(SPLIT_FILE)))
    if len(names.categories) >= VOID:
        raise PipelineError(
            f"categories: {len(names.categories)}, but a benchmark in VOC's layout has room for "
            f"{VOID - 1}; give fewer by another --params"
        )
    images = read_tool_file(path)
    folder, trained = ImageFolder(images_dir), Corrections(corrections_dir)
    reader = _Reader(names, skip_empty=skip_empty)
    label_ids = {name: label_id for label_id, name in enumerate(names.categories, start=1)}
    with (
        StageRun("import corrections", stats_path=stats_path, total=len(images)) as stage,
        replace_dir(out_dir) as temporary,
    ):
        writer, ids = VocWriter(temporary), dict[str, str]()
        for image in images:
            try:
                photo = folder.photo(image)
                correction = reader.correction(image, photo)
                semantic, numbers = correction.maps(label_ids)
                if numbers.max(initial=0) >= VOID:
                    raise UnusableError(f"has more than {VOID - 1} objects")
                image_id = _new_id(photo, ids)
            except UnusableError as error:
                stage.skip(image.names[0], str(error))
                continue
            objects = np.where(semantic == IGNORE_INDEX, IGNORE_INDEX, numbers.astype(np.int32))
            writer.add(image_id, photo.jpeg, semantic, objects)
            stage.count("objects", int(numbers.max(initial=0)))
            stage.count("reencoded", photo.jpeg is not photo.data)
            stage.count("trained_on", trained.get(photo.sha256) is not None)
            stage.advance()
        _check_any(path, stage)
        reader.report(stage)
        if stage.counts["trained_on"]:
            stage.warn(
                f"{stage.counts['trained_on']} of its images are in {corrections_dir}: training "
                "sees their truth, so scores on them say little"
            )
        writer.write_split(SPLIT, ids.values())


def params_lines(name: str, root: Path, categories: str | Sequence[str]) -> list[str]:
    """The lines of params.yaml for a benchmark that `write_benchmark` has written."""
    listed = categories if isinstance(categories, str) else json.dumps(list(categories))
    return [
        "benches:",
        f"  {name}:",
        "    format: voc",
        f"    root: {root}",
        f"    split: {SPLIT}",
        f"    categories: {listed}",
    ]


class _Reader:
    """Makes corrections of what a tool says, by our names."""

    def __init__(self, names: Names, *, skip_empty: bool) -> None:
        self._categories = {plain_name(name): name for name in names.categories}
        self._background = {plain_name(name) for name in (BACKGROUND_NAME, *names.background)}
        self._skip_empty = skip_empty
        self._unknown: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def correction(self, image: ToolImage, found: Found | Photo) -> Correction:
        """The correction of an image.

        Raises:
            UnusableError: see `run`.
        """
        if image.problem is not None:
            raise UnusableError(image.problem)
        size = image.size or found.sizes[0]
        if size not in found.sizes:
            is_of = " or ".join(_size(own) for own in dict.fromkeys(found.sizes))
            raise UnusableError(f"its masks are of {_size(size)} pixels, the image of {is_of}")
        void = [it.mask for it in image.objects if self._is_void(it.category)]
        objects = [
            replace(it, category=self._name(it.category))
            for it in image.objects
            if not self._is_void(it.category)
        ]
        self._left_out += image.left_out
        unknown = self._count_unknown(objects)
        if objects and len(unknown) == len(objects):
            raise UnusableError(f"all of its objects are of unknown names: {listing(unknown)}")
        correction = Correction(found.sha256, found.name, size, objects, _union(void))
        if self._skip_empty and correction.is_empty:
            raise UnusableError("has no object")
        return correction

    def report(self, stage: StageRun) -> None:
        """Count and name what was no object of a category."""
        if self._unknown:
            stage.count("unknown_objects", self._unknown.total())
            stage.warn(
                f"unknown names: {counted(self._unknown)} (images of nothing else are skipped; "
                "beside other objects they are void); the categories are "
                f"{listing(list(self._categories.values()))}"
            )
        for kind, count in sorted(self._left_out.items()):
            stage.left_out[kind] += count

    def _name(self, name: str) -> str:
        """A tool's name as ours, or as it is."""
        plain = plain_name(name)
        if plain in self._categories:
            return self._categories[plain]
        if plain in self._background:
            return BACKGROUND_NAME
        return name.strip()

    def _is_void(self, name: str) -> bool:
        plain = plain_name(name)
        return plain in VOID_NAMES and plain not in self._categories

    def _count_unknown(self, objects: Iterable[CorrectedObject]) -> list[str]:
        """The unknown names, one an object."""
        known = {*self._categories.values(), BACKGROUND_NAME}
        unknown = [it.category for it in objects if it.category not in known]
        self._unknown.update(unknown)
        return unknown


def _union(masks: Sequence[Rle]) -> Rle | None:
    return encode_mask(np.logical_or.reduce(list(map(decode_mask, masks)))) if masks else None


def _change(before: Correction | None, now: Correction) -> str:
    if before is None:
        return "new"
    return "unchanged" if before == now else "replaced"


def _new_id(photo: Photo, ids: dict[str, str]) -> str:
    """A name for an image that is no other's; `ids` keeps it by content.

    Raises:
        UnusableError: the same content has one already.
    """
    if photo.sha256 in ids:
        raise UnusableError(f"has the content of {ids[photo.sha256]}")
    image_id = ID.sub("_", str(PurePosixPath(photo.name).with_suffix("")))
    if image_id in ids.values():
        image_id = f"{image_id}_{photo.sha256[:ID_DIGITS]}"
    ids[photo.sha256] = image_id
    return image_id


def _check_any(path: Path, stage: StageRun) -> None:
    if stage.items:
        return
    if not stage.skipped:
        raise PipelineError(f"{path}: has no images")
    reasons = Counter(entry["reason"] for entry in stage.skipped)
    first = stage.skipped[0]
    raise PipelineError(
        f"{path}: none of its {len(stage.skipped)} images can be used ({counted(reasons)}); the "
        f"first is {first['item']}: {first['reason']}"
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
