"""Datumaro's own JSON: a file a split, masks as COCO's run-length code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import JsonRows, all_facts, write_image
from pipeline.formats.rle import encode_mask

IMAGE_MEDIA = 2  # datumaro's number of this kind of medium


class Datumaro:
    """Writes `images/SPLIT/NAME` and `annotations/SPLIT.json`, see `Exporter`."""

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        labels = [{"name": name, "parent": "", "attributes": []} for name in categories]
        self._head = {
            "dm_format_version": "1.0",
            "media_type": IMAGE_MEDIA,
            "infos": {},
            "categories": {"label": {"labels": labels, "label_groups": [], "attributes": []}},
        }
        self._splits: dict[str, JsonRows] = {}

    def add(self, image: ExportedImage) -> None:
        write_image(self._folder / "images" / image.split, image)
        self._of_split(image.split).add(
            {
                "id": PurePosixPath(image.name).with_suffix("").as_posix(),
                "annotations": [
                    _annotation(number, found) for number, found in enumerate(image.objects)
                ],
                "attr": all_facts(image),
                "image": {"path": image.name, "size": [image.height, image.width]},
            }
        )

    def finish(self) -> str:
        self._of_split("train")
        for rows in self._splits.values():
            rows.close()
        return f"datumaro.Dataset.import_from({str(self._folder)!r}, 'datumaro')"

    def _of_split(self, split: str) -> JsonRows:
        if split not in self._splits:
            path = self._folder / "annotations" / f"{split}.json"
            self._splits[split] = JsonRows(path, around=self._head)
        return self._splits[split]


def _annotation(number: int, found: ExportedObject) -> dict[str, Any]:
    return {
        "id": number,
        "type": "mask",
        "attributes": {} if found.score is None else {"score": found.score},
        "group": 0,
        "label_id": found.category - 1,
        "rle": encode_mask(found.mask),
        "z_order": 0,
    }
