"""FiftyOne: samples with all that is known of them, and the script that makes a dataset of them.

FiftyOne has a database; what lies on disk is made of public calls by `open_fiftyone.py`, which
works with any of its versions and needs no other package.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import JsonRows, crop_mask, is_plain, plain_facts, write_image
from pipeline.files import write_bytes, write_json
from pipeline.formats.images import encode_label, encode_png
from pipeline.formats.labels import LABEL_TYPE

SCRIPT = "open_fiftyone.py"


class Fiftyone:
    """Writes `images/NAME`, label maps, `samples.json`, `categories.json` and a script.

    Fields of a sample are `instances` and `semantic`, and each fact under its name: numbers and
    texts, objects, or label maps. The split is a tag.
    """

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories
        self._samples = JsonRows(folder / "samples.json")

    def add(self, image: ExportedImage) -> None:
        write_image(self._folder / "images", image)
        known = {"instances": image.objects, "semantic": image.semantic, **image.facts}
        labels = {
            field: self._labels(image, field, value)
            for field, value in known.items()
            if value is not None and not is_plain(value)
        }
        self._samples.add(
            {
                "image": f"images/{image.name}",
                "size": [image.width, image.height],
                "split": image.split,
                "facts": plain_facts(image),
                "labels": labels,
            }
        )

    def finish(self) -> str:
        self._samples.close()
        write_json(self._folder / "categories.json", list(self._categories))
        script = resources.files("pipeline.exporters").joinpath(SCRIPT).read_bytes()
        write_bytes(self._folder / SCRIPT, script)
        return f"python {self._folder}/{SCRIPT}"

    def _labels(self, image: ExportedImage, field: str, value: Any) -> Any:
        """Objects as they stand in the file; the path of a label map that is written beside it."""
        if not isinstance(value, np.ndarray):
            return [self._object(found) for found in value]
        path = PurePosixPath("labels", field, image.name).with_suffix(".png").as_posix()
        ids = value.astype(LABEL_TYPE)  # 65535, void, is -1 there
        write_bytes(self._folder / path, encode_label(ids, len(self._categories)))
        return path

    def _object(self, found: ExportedObject) -> dict[str, Any]:
        left, top, mask = crop_mask(found.mask)
        return {
            "label": self._categories[found.category - 1],
            "score": found.score,
            "box": [left, top, mask.shape[1], mask.shape[0]],
            "mask": base64.b64encode(encode_png(mask)).decode("ascii"),
        }
