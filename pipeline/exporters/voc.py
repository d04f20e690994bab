"""PASCAL VOC's segmentation layout, as `pipeline.benchmarks.voc` reads it, and `labelmap.txt`.

`SegmentationClass` is the label map. An object of `SegmentationObject` has those of its pixels that
the label map gives its category, so that both files agree; where objects overlap, the first keeps
the pixel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.benchmarks.voc import CLASSES, VOID, VocWriter, voc_palette
from pipeline.errors import PipelineError
from pipeline.exporters.images import as_jpeg
from pipeline.exporters.items import ExportedImage
from pipeline.exporters.maps import label_map, object_map
from pipeline.files import native_path
from pipeline.formats.images import WORD_IGNORE

LABELMAP = "labelmap.txt"
MOST = VOID - 1


class Voc:
    """Writes VOC's layout; see `Exporter`.

    Attributes:
        counts: objects that got no pixel, because others or the label map have them all.
    """

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        if len(categories) > MOST:
            raise PipelineError(
                f"--to voc: {len(categories)} categories, but its palette has room for {MOST}; "
                "export to png16 or coco"
            )
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._categories = categories
        self._writer = VocWriter(folder)
        self._splits: dict[str, list[str]] = {}

    def add(self, image: ExportedImage) -> None:
        stem = PurePosixPath(image.name).stem
        self._splits.setdefault(image.split, []).append(stem)
        labels = label_map(image)
        places = object_map(image)
        wanted = np.array([0, *(item.category for item in image.objects)], dtype=np.uint16)
        places[wanted[places] != labels] = 0
        kept = np.unique(places[places > 0])[:MOST]
        numbers = np.zeros(len(image.objects) + 1, dtype=np.uint8)
        numbers[kept] = np.arange(1, len(kept) + 1)
        if lost := len(image.objects) - len(kept):
            self.counts["objects_without_pixels"] += lost
        self._writer.add(
            str(native_path(stem)),
            as_jpeg(image.name, image.data),
            np.where(labels == WORD_IGNORE, VOID, labels),
            np.where(labels == WORD_IGNORE, VOID, numbers[places]),
        )

    def finish(self) -> str:
        for split, stems in self._splits.items():
            self._writer.write_split(split, stems)
        names = ["background", *self._categories]
        colours = voc_palette()[[*range(len(names)), VOID]]
        text = "# label:color_rgb:parts:actions\n" + "".join(
            f"{name.replace(':', ' ')}:{','.join(map(str, colour))}::\n"
            for name, colour in zip([*names, "void"], colours, strict=True)
        )
        (self._folder / LABELMAP).write_text(text, encoding="utf-8")
        return f"any reader of PASCAL VOC: {self._folder / CLASSES}, ids as in {LABELMAP}"
