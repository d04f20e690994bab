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

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import JsonRows, all_facts, crop_mask, write_image, write_named
from pipeline.files import write_bytes, write_json
from pipeline.formats.images import encode_label, encode_png
from pipeline.formats.labels import LABEL_TYPE

SCRIPT = "open_fiftyone.py"


class Fiftyone:
    """Writes `images/NAME`, `semantic/NAME`, `samples.json`, `categories.json` and a script.

    Fields of a sample are `instances`, `semantic`, `truth` and each fact under its name; the split
    is a tag.
    """

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._categories = categories
        self._samples = JsonRows(folder / "samples.json")

    def add(self, image: ExportedImage) -> None:
        write_image(self._folder / "images", image)
        objects = {"instances": image.objects, "truth": image.truth}
        self._samples.add(
            {
                "image": f"images/{image.name}",
                "size": [image.width, image.height],
                "split": image.split,
                "facts": all_facts(image),
                "objects": {
                    field: [self._object(item) for item in items]
                    for field, items in objects.items()
                    if items is not None
                },
                "semantic": self._semantic(image),
            }
        )

    def finish(self) -> str:
        self._samples.close()
        write_json(self._folder / "categories.json", list(self._categories))
        script = resources.files("pipeline.exporters").joinpath(SCRIPT).read_bytes()
        write_bytes(self._folder / SCRIPT, script)
        return f"python {self._folder}/{SCRIPT}"

    def _semantic(self, image: ExportedImage) -> str | None:
        """The path of the label map, which is written there."""
        if image.semantic is None:
            return None
        path = PurePosixPath("semantic", image.name).with_suffix(".png").as_posix()
        ids = image.semantic.astype(LABEL_TYPE)  # 65535, void, is -1 there
        write_named(self._folder, path, encode_label(ids, len(self._categories)))
        return path

    def _object(self, found: ExportedObject) -> dict[str, Any]:
        left, top, mask = crop_mask(found.mask)
        return {
            "label": self._categories[found.category - 1],
            "score": found.score,
            "box": [left, top, mask.shape[1], mask.shape[0]],
            "mask": base64.b64encode(encode_png(mask)).decode("ascii"),
        }
