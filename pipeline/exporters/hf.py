"""Hugging Face datasets: Parquet files with images and masks, typed by the schema's metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exporters.items import ExportedImage, ExportedObject
from pipeline.exporters.parts import all_facts, as_json
from pipeline.formats.images import encode_label, encode_png
from pipeline.formats.labels import LABEL_TYPE

SPLITS = {"train": "train", "val": "validation"}
GROUP_IMAGES = 100  # rows that a reader decodes at a time
GROUP_BYTES = 1 << 26
FILE_BYTES = 1 << 29
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
OBJECT = pa.struct([("mask", PICTURE), ("category", pa.int64()), ("score", pa.float32())])
COLUMNS = {
    "image": PICTURE,
    "objects": pa.list_(OBJECT),
    "truth": pa.list_(OBJECT),
    "semantic": PICTURE,
    "name": pa.string(),
    "facts": pa.string(),
}


class Hf:
    """Writes `data/SPLIT-NUMBER.parquet`, see `Exporter`.

    Columns: `image`; `objects`, each with `mask` (0 and 255), `category` (a label id, 0 is
    background) and `score`; `truth`, the same of true objects, or null; `semantic`, a label map or
    null; `name`; `facts`, JSON.
    """

    def __init__(self, folder: Path, categories: Sequence[str]) -> None:
        self._folder = folder
        self._num_categories = len(categories)
        self._schema = _schema(categories)
        self._splits: dict[str, _Split] = {}

    def add(self, image: ExportedImage) -> None:
        self._of_split(image.split).add(self._row(image))

    def finish(self) -> str:
        self._of_split("train")
        for split in self._splits.values():
            split.close()
        return f"datasets.load_dataset({str(self._folder)!r})"

    def _of_split(self, split: str) -> _Split:
        if split not in self._splits:
            self._splits[split] = _Split(self._folder / "data", SPLITS[split], self._schema)
        return self._splits[split]

    def _row(self, image: ExportedImage) -> dict[str, Any]:
        return {
            "image": _picture(image.data, image.name),
            "objects": [_object(item) for item in image.objects],
            "truth": None if image.truth is None else [_object(item) for item in image.truth],
            "semantic": self._semantic(image),
            "name": image.name,
            "facts": as_json(all_facts(image)),
        }

    def _semantic(self, image: ExportedImage) -> dict[str, Any] | None:
        if image.semantic is None:
            return None
        ids = image.semantic.astype(LABEL_TYPE)  # 65535, void, is -1 there
        return _picture(encode_label(ids, self._num_categories))


class _Split:
    """The files of a split, the next one begun when one is large enough."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._name, self._schema = folder, name, schema
        self._rows: list[dict[str, Any]] = []
        self._bytes = self._file_bytes = 0
        self._number = 0
        self._writer = self._next_file()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._bytes += len(row["image"]["bytes"]) + sum(
            len(found["mask"]["bytes"]) for found in row["objects"]
        )
        if len(self._rows) >= GROUP_IMAGES or self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._close_file()

    def _flush(self) -> None:
        if self._file_bytes >= FILE_BYTES:
            self._close_file()
            self._writer = self._next_file()
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._file_bytes += self._bytes
        self._rows, self._bytes = [], 0

    def _next_file(self) -> pq.ParquetWriter:
        path = self._folder / f"{self._name}-{self._number:05d}.parquet"
        self._number += 1
        self._file_bytes = 0
        self._file = path.open("wb")  # pyarrow itself takes no names but in UTF-8
        return pq.ParquetWriter(self._file, self._schema)

    def _close_file(self) -> None:
        self._writer.close()
        self._file.close()


def _object(item: ExportedObject) -> dict[str, Any]:
    mask = _picture(encode_png(item.mask))
    return {"mask": mask, "category": item.category, "score": item.score}


def _picture(data: bytes, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def _schema(categories: Sequence[str]) -> pa.Schema:
    """Columns, with what `datasets` is to make of them."""
    image = {"_type": "Image"}
    text = {"dtype": "string", "_type": "Value"}
    category = {"names": ["background", *categories], "_type": "ClassLabel"}
    score = {"dtype": "float32", "_type": "Value"}
    objects = [{"mask": image, "category": category, "score": score}]
    features = {
        "image": image,
        "objects": objects,
        "truth": objects,
        "semantic": image,
        "name": text,
        "facts": text,
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema(list(COLUMNS.items()), metadata=metadata)
