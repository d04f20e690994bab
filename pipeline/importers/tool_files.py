"""Masks as labelling tools write them: COCO's JSON, or Label Studio's.

COCO: every annotation is one object, `iscrowd` or not, for some tools set it on every mask that is
run-length coded. Label Studio: of a task the last annotation that was not cancelled, its brushes,
polygons and rectangles; predictions and drafts are nobody's word. A task without an annotation has
not been looked at.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import ijson

from pipeline.benchmarks.coco import (
    MAX_PIXELS,
    check_paths,
    elements,
    field_of,
    open_json,
    parse_category,
    parse_image,
)
from pipeline.errors import PipelineError
from pipeline.formats.brush_rle import decode_brush
from pipeline.formats.corrections import CorrectedObject
from pipeline.formats.rle import Rle, encode_mask, encode_segmentation

UPLOAD = re.compile(r"[0-9a-f]{8}-")  # what Label Studio puts before the name of an uploaded file
PERCENT = 100.0
LABELS = "labels"  # a result of tags apart from their shapes, and what the types of others end with
EXPORT = "export the project as JSON"

Size = tuple[int, int]


@dataclass
class ToolImage:
    """What a tool's file says of an image.

    Attributes:
        names: paths or names that it may have elsewhere, the most telling first.
        sha256: of its own file, where `pipeline export` has said so and the tool has kept it.
        size: (H, W); None where no mask says it.
        objects: its objects, of the names that the tool has for them.
        problem: why it cannot be used.
        left_out: what is no mask, by kind.
    """

    names: list[str]
    sha256: str | None = None
    size: Size | None = None
    objects: list[CorrectedObject] = field(default_factory=list)
    problem: str | None = None
    left_out: Counter[str] = field(default_factory=Counter)


def read_tool_file(path: Path) -> list[ToolImage]:
    """The images of a file, in its order.

    Raises:
        PipelineError: it is neither COCO's nor Label Studio's, or damaged.
    """
    check_paths(path)
    with open_json(path) as file:
        first = next((event for event, _ in ijson.basic_parse(file, use_float=True)), None)
    if first == "start_map":
        return _read_coco(path)
    if first == "start_array":
        return list(_read_label_studio(path))
    raise PipelineError(
        f"{path}: neither COCO's annotations (an object of images, annotations, categories) nor "
        "Label Studio's (a list of tasks)"
    )


# -- COCO ------------------------------------------------------------------------------------------


def _read_coco(path: Path) -> list[ToolImage]:
    images: dict[int, ToolImage] = {}
    for place, entry in enumerate(elements(path, "images")):
        with _naming(path, f"images[{place}]"):
            coco_id, image = parse_image(entry)
            if coco_id in images:
                raise ValueError(f"id {coco_id} is there twice")
            images[coco_id] = ToolImage([image.file_name], _sha256(entry), image.size)
    names: dict[int, str] = {}
    for place, entry in enumerate(elements(path, "categories")):
        with _naming(path, f"categories[{place}]"):
            coco_id, name = parse_category(entry)
            names[coco_id] = name
    for place, entry in enumerate(elements(path, "annotations")):
        with _naming(path, f"annotations[{place}]"):
            _add_annotation(entry, images, names)
    return list(images.values())


def _add_annotation(
    entry: Mapping[str, Any], images: Mapping[int, ToolImage], names: Mapping[int, str]
) -> None:
    image_id = field_of(entry, "image_id", int)
    if image_id not in images:
        raise ValueError(f"image_id {image_id} is not among the images")
    category_id = field_of(entry, "category_id", int)
    if category_id not in names:
        raise ValueError(f"category_id {category_id} is not among the categories")
    image = images[image_id]
    size, segmentation = image.size, entry.get("segmentation")
    if not segmentation:
        image.left_out["box without a mask"] += 1
        return
    assert size is not None
    try:
        counts = encode_segmentation(segmentation, size)
    except (KeyError, ValueError) as error:
        image.problem = image.problem or _reason(error)
        return
    if counts is None:
        image.left_out["mask without a pixel"] += 1
        return
    mask: Rle = {"size": list(size), "counts": counts.decode("ascii")}
    image.objects.append(CorrectedObject(names[category_id], mask))


# -- Label Studio ----------------------------------------------------------------------------------


def _read_label_studio(path: Path) -> Iterator[ToolImage]:
    with open_json(path) as file:
        for place, task in enumerate(ijson.items(file, "item", use_float=True)):
            with _naming(path, f"task {place + 1}"):
                yield _read_task(task)


def _read_task(task: Any) -> ToolImage:
    if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
        raise ValueError(f"not a task with `data`; {EXPORT}")
    if "annotations" not in task:
        raise ValueError(f"no `annotations`; {EXPORT}, not as JSON-MIN")
    image = ToolImage(_task_names(task), _sha256(task["data"]))
    done = [it for it in field_of(task, "annotations", list) if not it.get("was_cancelled")]
    if not done:
        image.problem = "has no annotation"
        return image
    last = max(done, key=lambda it: (str(it.get("updated_at") or ""), it.get("id") or 0))
    try:
        _add_results(image, field_of(last, "result", list))
    except (KeyError, ValueError, TypeError) as error:
        image.problem = _reason(error)
    return image


def _task_names(task: Mapping[str, Any]) -> list[str]:
    """The image's path in a URL, the query or the upload, and without what uploading adds."""
    texts = [text for text in task["data"].values() if isinstance(text, str)]
    named = task["data"].get("image")
    found = named if isinstance(named, str) else next(iter(texts), None)
    if found is None:
        raise ValueError("its `data` names no image")
    url = urlsplit(found.replace("\\", "/"))
    local = parse_qs(url.query).get("d")  # /data/local-files/?d=FOLDER/NAME
    name = local[0] if local else unquote(url.path)
    folder, slash, last = name.rpartition("/")
    bare = UPLOAD.sub("", last, count=1)
    return list(dict.fromkeys([name, f"{folder}{slash}{bare}"]))


def _add_results(image: ToolImage, results: Sequence[Any]) -> None:
    """Add the regions; those of several results of one id are one, as without label tags.

    A result without a value, such as a relation of two regions, is no region.
    """
    regions: dict[str, dict[str, Any]] = {}
    for place, result in enumerate(results):
        value = field_of(result, "value", dict) if "value" in result else {}
        kind = field_of(result, "type", str)
        if not ({"rle", "points", "x"} & value.keys()) and LABELS not in value:
            image.left_out[kind] += 1
            continue
        region = regions.setdefault(str(result.get("id", place)), {"type": kind})
        region |= {**value, "type": kind if kind != LABELS else region["type"]}
        region[LABELS] = value.get(kind) or value.get(LABELS) or region.get(LABELS)
        region["size"] = (
            field_of(result, "original_height", int),
            field_of(result, "original_width", int),
        )
    for region in regions.values():
        _add_region(image, region)


def _add_region(image: ToolImage, region: Mapping[str, Any]) -> None:
    size: Size = region["size"]
    kind = region["type"].removesuffix(LABELS)
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"original size {size[1]}x{size[0]}")
    if image.size is not None and size != image.size:
        raise ValueError(f"its regions are of {image.size[::-1]} and of {size[::-1]} pixels")
    image.size = size
    if "rle" not in region and kind not in SHAPES:
        image.left_out[kind or LABELS] += 1
        return
    labels = region[LABELS]
    if not isinstance(labels, list) or len(labels) != 1 or not isinstance(labels[0], str):
        raise ValueError(f"a {kind} has not one label but {labels or 'none'}")
    mask = _brush(region["rle"], size) if "rle" in region else SHAPES[kind](region, size)
    if mask is None:
        image.left_out["mask without a pixel"] += 1
    else:
        image.objects.append(CorrectedObject(labels[0], mask))


def _brush(code: Any, size: Size) -> Rle | None:
    mask = decode_brush(code, size)
    return encode_mask(mask) if mask.any() else None


def _polygon(region: Mapping[str, Any], size: Size) -> Rle | None:
    return _outlined([_point(x, y, size) for x, y in region["points"]], size)


def _rectangle(region: Mapping[str, Any], size: Size) -> Rle | None:
    """A rectangle, turned clockwise about its upper left corner."""
    left, top = _point(region["x"], region["y"], size)
    width, height = _point(region["width"], region["height"], size)
    turn = math.radians(region.get("rotation") or 0)
    cosine, sine = math.cos(turn), math.sin(turn)
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    return _outlined(
        [(left + cosine * x - sine * y, top + sine * x + cosine * y) for x, y in corners], size
    )


SHAPES = {"polygon": _polygon, "rectangle": _rectangle}


def _outlined(points: Sequence[tuple[float, float]], size: Size) -> Rle | None:
    counts = encode_segmentation([[length for point in points for length in point]], size)
    return {"size": list(size), "counts": counts.decode("ascii")} if counts else None


def _point(x: float, y: float, size: Size) -> tuple[float, float]:
    """Pixels of percent of an image's sides."""
    return float(x * size[1] / PERCENT), float(y * size[0] / PERCENT)


@contextmanager
def _naming(path: Path, place: str) -> Iterator[None]:
    """Turn what is wrong with an element of a file into an error that names both."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise PipelineError(f"{path}: {place}: {_reason(error)}") from None


def _sha256(entry: Mapping[str, Any]) -> str | None:
    stated = entry.get("sha256")
    return stated if isinstance(stated, str) else None


def _reason(error: BaseException) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
