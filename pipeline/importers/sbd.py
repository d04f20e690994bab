"""Label maps of the Semantic Boundaries Dataset -> PASCAL VOC's layout: the list `trainaug`.

SBD (Hariharan et al., ICCV 2011) outlines the objects of 11,355 images of VOC 2012. Its `dataset`
folder has `cls/ID.mat`, label ids that are VOC's, and the lists `train.txt` and `val.txt`; its
images are VOC's own. With VOC's `train`, and without VOC's `val`, they are 10,582 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.benchmarks.lists import check_files, check_folder, read_ids
from pipeline.benchmarks.voc import CLASSES, IMAGES, SPLITS, VocWriter, encode_index_png
from pipeline.engine.progress import StageRun
from pipeline.errors import PipelineError
from pipeline.files import write_bytes
from pipeline.formats.images import ImageError, one_line, read_file, stored_size
from pipeline.importers.matlab import read_field

TRAINAUG = "trainaug"
NUM_TRAINAUG = 10_582
NUM_CATEGORIES = 20
BELOW = (".", "dataset", "benchmark_RELEASE/dataset")


def run(*, sbd_dir: Path, voc_dir: Path, stats_path: Path) -> None:
    """Write SBD's label maps into a folder of VOC's, and the list `trainaug`.

    Of an image that VOC has a label map of, it stays as it is: so a run that was cut off goes on
    where it was. A file that cannot be used is skipped and listed, and its image is not in the
    list.

    Args:
        sbd_dir: SBD's folder `dataset`, or one of the two that it is unpacked in.
        voc_dir: folder of VOC 2012, with `JPEGImages`, `SegmentationClass`, `ImageSets`.
        stats_path: JSON file of the counts. `written`; `present`: label maps that were there.

    Raises:
        PipelineError: a folder, list, image or .mat file is missing.
    """
    sbd_dir = _dataset_dir(sbd_dir)
    check_folder(voc_dir / SPLITS, "VOC 2012's lists")
    own = read_ids(voc_dir / SPLITS / "train.txt")
    excluded = {*own, *read_ids(voc_dir / SPLITS / "val.txt")}
    listed = {*read_ids(sbd_dir / "train.txt"), *read_ids(sbd_dir / "val.txt")}
    further = sorted(listed - excluded)
    _check_there(sbd_dir, voc_dir, own, further)
    with StageRun("import sbd", stats_path=stats_path, total=len(further)) as stage_run:
        added = []
        for image_id in further:
            if _add_map(image_id, sbd_dir, voc_dir, stage_run):
                added.append(image_id)
                stage_run.advance()
        trainaug = [*own, *added]
        VocWriter(voc_dir).write_split(TRAINAUG, trainaug)
        if len(trainaug) != NUM_TRAINAUG:
            stage_run.warn(
                f"{TRAINAUG} has {len(trainaug):,} images, the published one {NUM_TRAINAUG:,}"
            )


def read_map(path: Path) -> NDArray[np.uint8]:
    """The label map (H, W) of a .mat file of SBD's, 0 for background.

    Raises:
        ImageError: it cannot be read, or holds no such map.
    """
    try:
        labels = read_field(read_file(path), "GTcls", "Segmentation")
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(f"no GTcls.Segmentation: {one_line(error)}") from None
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.size == 0:
        raise ImageError(f"Segmentation: {labels.dtype} {labels.shape}, not a map of label ids")
    if labels.min() < 0 or labels.max() > NUM_CATEGORIES:
        raise ImageError(
            f"label ids {labels.min()} to {labels.max()}, expected 0 to {NUM_CATEGORIES}"
        )
    return labels.astype(np.uint8)


def _dataset_dir(sbd_dir: Path) -> Path:
    """The folder of SBD that has `cls`, at or below the one that is given."""
    for below in BELOW:
        if (sbd_dir / below / "cls").is_dir():
            return sbd_dir / below
    raise PipelineError(
        f"{sbd_dir}: neither it nor {BELOW[-1]} in it has a folder cls; expected that of SBD, with "
        "cls/ID.mat, train.txt and val.txt"
    )


def _check_there(sbd_dir: Path, voc_dir: Path, own: Sequence[str], further: Sequence[str]) -> None:
    """Raise for the first file that is missing."""
    for folder in (IMAGES, CLASSES):
        check_folder(voc_dir / folder, "VOC 2012's layout")
    check_files(voc_dir / CLASSES, (f"{image_id}.png" for image_id in own), "VOC's train lists it")
    check_files(sbd_dir / "cls", (f"{image_id}.mat" for image_id in further), "SBD lists it")
    images = (f"{image_id}.jpg" for image_id in (*own, *further))
    check_files(voc_dir / IMAGES, images, f"{TRAINAUG} lists it")


def _add_map(image_id: str, sbd_dir: Path, voc_dir: Path, stage_run: StageRun) -> bool:
    """Write the label map of an image, if it is not there; whether it is there now."""
    target = voc_dir / CLASSES / f"{image_id}.png"
    if target.exists():
        stage_run.count_in_run("present")
        return True
    source = sbd_dir / "cls" / f"{image_id}.mat"
    try:
        labels = read_map(source)
        size = stored_size(voc_dir / IMAGES / f"{image_id}.jpg")
        if labels.shape != size:
            raise ImageError(f"labels {labels.shape}, but the image has {size} (rows, columns)")
    except ImageError as error:
        stage_run.skip(str(source), str(error))
        return False
    write_bytes(target, encode_index_png(labels))
    stage_run.count_in_run("written")
    return True
