"""COCO's layout of instance annotations: reader.

ROOT/annotations/instances_SPLIT.json     `images`, `annotations`, `categories`
ROOT/SPLIT/FILE_NAME                      the image, FILE_NAME as the JSON has it

An annotation whose mask has no pixel, as polygons of two points or a run-length code of background
have, is no object: it is left out, and a warning counts these. (COCO's own evaluation counts it as
an object to find, which nothing can match.) Integers have no decimal point, `true` and `false` are
no numbers, and `area`, `iscrowd` and the `id` of an annotation may be missing, but not null.

Letters: H, W height and width in pixels.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import fsdecode, fsencode
from pathlib import Path, PurePosixPath
from reprlib import repr as short_repr
from typing import Any, BinaryIO, NamedTuple, TypeVar

import ijson
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from pipeline.benchmarks.example import Example, InstanceTarget, MaskHeader
from pipeline.benchmarks.lists import check_folder, read_lines
from pipeline.errors import PipelineError, listing
from pipeline.formats.labels import LABEL_TYPE, LabelMap
from pipeline.formats.rle import encode_segmentation

MAX_DEPTH = 64  # brackets within brackets; COCO has 5
MAX_KEY_LENGTH = 1000
BUFFER_BYTES = 4096  # of JSON, whose paths are in memory together
MAX_NAME = 255  # bytes of a file's name
MAX_SIDE = 200_000  # pixels; no photo that can be read has more
MAX_PIXELS = (1 << 32) - 1  # pycocotools counts in 32 bits
BRACKETS = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
LISTED_NAMES = 20

T = TypeVar("T")


class Annotation(NamedTuple):
    """One annotated object; `counts` is its mask, COCO's compressed run-length code."""

    label_id: int
    counts: bytes
    crowd: bool
    area: float | None


@dataclass(frozen=True)
class CocoExample:
    """One image of a `CocoBenchmark`; see `Example`. `size` is (H, W), as `json_path` has it."""

    image_id: str
    image_path: Path
    json_path: Path
    size: tuple[int, int]
    annotations: list[Annotation]
    vocabulary: None = None

    def mask_headers(self) -> list[MaskHeader]:
        return [MaskHeader(self.json_path, self.size)]

    def semantic(self) -> LabelMap:
        """Label ids (H, W), painted from the annotations; nothing is void.

        Crowds are painted first, then objects from large to small, so that of several objects at
        one pixel the smallest is seen; of two of one size, the later one of the file. A crowd's
        pixels have its category. (The authors of ZUTIS scored label maps that they did not
        publish: what they do where objects overlap is not known.)
        """
        labels = np.zeros(self.size, dtype=LABEL_TYPE)
        for annotation in sorted(self.annotations, key=self._depth):
            labels[self._mask(annotation)] = annotation.label_id
        return labels

    def instances(self) -> list[InstanceTarget]:
        """All annotated objects, crowds too, in the order of the file."""
        return [
            InstanceTarget(
                annotation.label_id,
                self._mask(annotation),
                crowd=annotation.crowd,
                area=annotation.area,
            )
            for annotation in self.annotations
        ]

    def void(self) -> NDArray[np.bool_]:
        """No pixel: crowds are marked as such, not void."""
        return np.zeros(self.size, dtype=np.bool_)

    def _mask(self, annotation: Annotation) -> NDArray[np.bool_]:
        return coco_mask.decode(self._code(annotation)).astype(np.bool_)

    def _depth(self, annotation: Annotation) -> tuple[bool, int]:
        return not annotation.crowd, -int(coco_mask.area(self._code(annotation)))

    def _code(self, annotation: Annotation) -> dict[str, Any]:
        return {"size": self.size, "counts": annotation.counts}


@dataclass
class CocoImage:
    """An element of `images`, of `size` (H, W), with the annotated objects of it."""

    file_name: str
    size: tuple[int, int]
    annotations: list[Annotation] = field(default_factory=list)

    @property
    def image_id(self) -> str:
        """Its file name without folder and suffix."""
        return PurePosixPath(self.file_name).stem


class CocoBenchmark:
    """A split of a folder in COCO's layout; see `Benchmark`.

    Memory holds the annotations of the listed images as run-length codes, some 200 bytes each.
    """

    def __init__(
        self,
        root: Path,
        *,
        split: str,
        categories: list[str],
        groups: Mapping[str, str],
        annotations: str = "annotations/instances_{split}.json",
        images: str = "{split}",
        image_list: str = "",
    ) -> None:
        """Read lists and annotations and check that every image is there.

        `{split}` in a path stands for the split. Categories are matched by name, whatever their
        COCO ids; annotations of other categories, or of images that are not scored, are left out.
        An image without annotations is scored like the others. `warnings` counts
        annotations without a pixel, which are no objects.

        Args:
            root: the folder that holds all else.
            split: name of the split, such as `val2017`.
            categories: names in the order of the label ids, without background.
            groups: name -> file like `image_list`, whose images must be among those scored.
            annotations: JSON file of the annotations, below `root`.
            images: folder of the images, below `root`.
            image_list: file below `root` with one file name or path a line, in the order wanted;
                the folders of a path do not count. Empty: all images, in the order of their COCO
                ids.

        Raises:
            PipelineError: a file or folder is missing; the JSON is damaged or lacks a category or
                an image; a field has a wrong type or value, or names an image or category that the
                file lacks; an id is there twice; an annotation has no mask that fits its image; a
                list is empty or repeats itself.
        """
        self.root = Path(root)
        self.categories = list(categories)
        check_folder(self.root, "a benchmark in COCO's layout")
        self._json_path = self.root / annotations.replace("{split}", split)
        self._image_dir = self.root / images.replace("{split}", split)
        check_paths(self._json_path)
        known, label_ids = self._read_images_and_categories()
        scored = known
        if image_list:
            list_path = self.root / image_list.replace("{split}", split)
            scored = self._select(known, list_path)
        self._images = list(scored.values())
        self.groups = {name: self._read_group(name, of, scored) for name, of in groups.items()}
        self._check_files()
        self.warnings = self._read_annotations(known.keys(), scored, label_ids)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[Example]:
        for image in self._images:
            yield CocoExample(
                image.image_id,
                self._image_dir / image.file_name,
                self._json_path,
                image.size,
                image.annotations,
            )

    def _read_images_and_categories(self) -> tuple[dict[int, CocoImage], dict[int, int | None]]:
        """Images by COCO id, and label ids by COCO id (None: a category that is not asked for)."""
        images: dict[int, CocoImage] = {}
        for coco_id, image in self._parsed("images", "image", parse_image):
            self._check_new(coco_id, images, "image")
            images[coco_id] = image
        names: dict[int, str] = {}
        for coco_id, name in self._parsed("categories", "category", parse_category):
            self._check_new(coco_id, names, "category")
            names[coco_id] = name
        for key, entries in (("images", images), ("categories", names)):
            if not entries:
                raise PipelineError(
                    f"{self._json_path}: {key!r} is empty; expected COCO's instance annotations"
                )
        self._check_unique(images.values())
        return dict(sorted(images.items())), self._label_ids(names)

    def _label_ids(self, names: Mapping[int, str]) -> dict[int, int | None]:
        missing = [name for name in self.categories if name not in names.values()]
        if missing:
            raise PipelineError(
                f"{self._json_path}: no category is named {listing(missing, LISTED_NAMES)}; its "
                f"categories: {listing(list(names.values()), LISTED_NAMES)}"
            )
        wanted = {name: label_id for label_id, name in enumerate(self.categories, start=1)}
        label_ids = {coco_id: wanted.get(name) for coco_id, name in names.items()}
        for name, label_id in wanted.items():
            same = [str(coco_id) for coco_id, found in label_ids.items() if found == label_id]
            if len(same) > 1:
                raise PipelineError(
                    f"{self._json_path}: categories {listing(same)} have one name, {name!r}; "
                    "rename one, or give their annotations one category_id"
                )
        return label_ids

    def _check_unique(self, images: Iterable[CocoImage]) -> None:
        seen: dict[str, str] = {}
        for image in images:
            if image.image_id in seen:
                raise PipelineError(
                    f"{self._json_path}: images {seen[image.image_id]} and {image.file_name} have "
                    "one name; images are told apart by file name without folder and suffix"
                )
            seen[image.image_id] = image.file_name

    def _read_annotations(
        self,
        known: Collection[int],
        images: Mapping[int, CocoImage],
        label_ids: Mapping[int, int | None],
    ) -> list[str]:
        """Attach the annotations to their images, of which some of the known ones are scored.

        Returns what to warn of.
        """
        parse = partial(_parse_annotation, known=known, images=images, label_ids=label_ids)
        seen: set[int] = set()
        without: list[str] = []
        num_scored = 0
        parsed = self._parsed("annotations", "annotation", parse)
        for place, (coco_id, image, annotation) in enumerate(parsed):
            if coco_id is not None:
                self._check_new(coco_id, seen, "annotation")
                seen.add(coco_id)
            num_scored += image is not None
            if image is not None and annotation is not None:
                image.annotations.append(annotation)
            elif image is not None:
                without.append(f"annotations[{place}]" if coco_id is None else f"id {coco_id}")
        if not without:
            return []
        return [
            f"{self._json_path}: {len(without)} of {num_scored} annotations have no pixel in their "
            f"image; they are no objects and left out. The first: {without[0]}"
        ]

    def _parsed(self, key: str, kind: str, parse: Callable[[Any], T]) -> Iterator[T]:
        """The elements of an array, parsed; errors name the element by its id or place."""
        for place, entry in enumerate(elements(self._json_path, key)):
            if not isinstance(entry, dict):
                raise PipelineError(
                    f"{self._json_path}: {kind} {short_repr(entry)}: expected an object, at "
                    f"{key}[{place}]"
                )
            try:
                parsed = parse(entry)
            except (KeyError, ValueError) as error:
                problem = f"no {error}" if isinstance(error, KeyError) else str(error)
                name = short_repr(entry["id"]) if "id" in entry else f"at {key}[{place}]"
                raise PipelineError(f"{self._json_path}: {kind} {name}: {problem}") from None
            yield parsed

    def _check_new(self, coco_id: int, seen: Collection[int], kind: str) -> None:
        if coco_id in seen:
            raise PipelineError(
                f"{self._json_path}: {kind} {coco_id} is listed twice; each needs an id of its own"
            )

    def _select(self, images: Mapping[int, CocoImage], list_path: Path) -> dict[int, CocoImage]:
        """The images that a file lists, in its order."""
        ids = {}
        for coco_id, image in images.items():
            ids[image.image_id] = ids[PurePosixPath(image.file_name).name] = coco_id
        selected: dict[int, CocoImage] = {}
        unknown: list[str] = []
        for line in read_lines(list_path, "one image file name a line"):
            name = PurePosixPath(line).name
            if name not in ids:
                unknown.append(line)
            elif ids[name] in selected:
                raise PipelineError(f"{list_path}: image {line} is listed twice")
            else:
                selected[ids[name]] = images[ids[name]]
        if unknown:
            raise PipelineError(
                f"{list_path}: {len(unknown)} images are not among those scored of "
                f"{self._json_path}, for example {unknown[0]}"
            )
        return selected

    def _read_group(self, name: str, of: str, images: Mapping[int, CocoImage]) -> frozenset[str]:
        try:
            selected = self._select(images, self.root / of)
        except PipelineError as error:
            raise PipelineError(f"group {name!r}: {error}") from None
        return frozenset(image.image_id for image in selected.values())

    def _check_files(self) -> None:
        check_folder(self._image_dir, "the benchmark's images")
        missing = [
            image.file_name
            for image in self._images
            if not _is_file(self._image_dir / image.file_name)
        ]
        if missing:
            raise PipelineError(
                f"{self._image_dir / missing[0]}: no such file, but {self._json_path.name} has it; "
                f"{len(missing)} of {len(self._images)} images are missing"
            )


def _is_file(path: Path) -> bool:
    """Whether it is one; what is too long for a path is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_paths(path: Path) -> None:
    """Refuse a JSON file of deep brackets or long keys.

    `ijson` keeps for each place in it the path there, and for all of a buffer at once: 100,000
    brackets took 21 GB.

    Raises:
        PipelineError: no such file, not JSON, or beyond `MAX_DEPTH` or `MAX_KEY_LENGTH`.
    """
    depth = 0
    with open_json(path) as file:
        for event, value in ijson.basic_parse(file, use_float=True):  # no paths yet
            depth += BRACKETS.get(event, 0)
            if depth > MAX_DEPTH:
                problem = f"brackets are nested more than {MAX_DEPTH} deep"
            elif event == "map_key" and len(value) > MAX_KEY_LENGTH:
                problem = f"a key has {len(value)} characters, at most {MAX_KEY_LENGTH} are read"
            else:
                continue
            raise PipelineError(
                f"{path}: {problem}; expected COCO's instance annotations: if the file is damaged, "
                "download it again"
            )


def elements(path: Path, key: str) -> Iterator[Any]:
    """The elements of an array of a JSON object, of which memory holds one at a time.

    Raises:
        PipelineError: no such file, not JSON, or the object has no array of this name.
    """
    is_empty = True
    with open_json(path) as file:
        for element in ijson.items(file, f"{key}.item", use_float=True):
            is_empty = False
            yield element
    if is_empty:
        with open_json(path) as file:
            parsed = ijson.parse(file, buf_size=BUFFER_BYTES)
            is_object = next(parsed)[1] == "start_map"
            events = (event for prefix, event, _ in parsed if prefix == key)
            if next(events, None) != "start_array":
                top = (
                    ""
                    if is_object
                    else "the file holds no object at its top, but a list or value; "
                )
                raise PipelineError(
                    f"{path}: {key!r} is missing, or is not an array; {top}expected COCO's "
                    "instance annotations (an object of images, annotations, categories), not its "
                    "list of test images"
                )


@contextmanager
def open_json(path: Path) -> Iterator[BinaryIO]:
    """A JSON file from its first byte that is no byte order mark; errors in it name it."""
    try:
        with path.open("rb") as file:
            encoding = json.detect_encoding(file.read(4))
            if not encoding.startswith("utf-8"):
                raise PipelineError(
                    f"{path}: not valid JSON in UTF-8: its text is {encoding}; save it as UTF-8"
                )
            file.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
            try:
                yield file
            except ijson.JSONError as error:
                # Its later lines quote the place, as bytes if it is not text.
                problem = fsdecode(error.args[0]).splitlines()[0].rstrip(".")
                raise PipelineError(
                    f"{path}: not valid JSON before byte {file.tell()}: {problem}; JSON has no "
                    "NaN, Infinity or number beyond 64 bits; if the file is cut short or damaged, "
                    "unpack or download it again"
                ) from None
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; expected annotations as JSON") from None
    except OSError as error:
        raise PipelineError(f"{path}: cannot be read: {error.strerror}") from None


def parse_image(entry: Mapping[str, Any]) -> tuple[int, CocoImage]:
    """COCO id and image of an element of `images`.

    Raises:
        KeyError, ValueError: a field is missing or has a wrong type or value.
    """
    coco_id = field_of(entry, "id", int)
    file_name = field_of(entry, "file_name", str)
    path = PurePosixPath(file_name)
    is_long = any(len(fsencode(part)) > MAX_NAME for part in path.parts)
    if not path.name or path.is_absolute() or ".." in path.parts or is_long:
        raise ValueError(
            f"file_name {short_repr(file_name)} is not the path of a file below a folder"
        )
    size = (field_of(entry, "height", int), field_of(entry, "width", int))
    if min(size) < 1 or max(size) > MAX_SIDE:
        raise ValueError(f"size {size[1]}x{size[0]}: expected sides of 1 to {MAX_SIDE} pixels")
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"size {size[1]}x{size[0]}: expected at most {MAX_PIXELS} pixels")
    return coco_id, CocoImage(file_name, size)


def parse_category(entry: Mapping[str, Any]) -> tuple[int, str]:
    """COCO id and name of an element of `categories`.

    Raises:
        KeyError, ValueError: a field is missing or has a wrong type or value.
    """
    coco_id, name = field_of(entry, "id", int), field_of(entry, "name", str).strip()
    if not name:
        raise ValueError("its name is empty")
    return coco_id, name


def _parse_annotation(
    entry: Mapping[str, Any],
    *,
    known: Collection[int],
    images: Mapping[int, CocoImage],
    label_ids: Mapping[int, int | None],
) -> tuple[int | None, CocoImage | None, Annotation | None]:
    """COCO id, image and content of an element of `annotations`; no content without a pixel.

    No id where the element has none; no image either where that or the category is not scored.
    """
    coco_id = field_of(entry, "id", int) if "id" in entry else None
    image_id = field_of(entry, "image_id", int)
    if image_id not in known:
        raise ValueError(
            f"image_id {image_id} is not among the images; add the image, or remove it"
        )
    category_id = field_of(entry, "category_id", int)
    if category_id not in label_ids:
        raise ValueError(f"category_id {category_id} is not among the categories")
    label_id = label_ids[category_id]
    if image_id not in images or label_id is None:
        return coco_id, None, None
    image = images[image_id]
    crowd = field_of(entry, "iscrowd", int) if "iscrowd" in entry else 0
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd is {crowd}; expected 0 or 1")
    area = field_of(entry, "area", int, float) if "area" in entry else None
    if area is not None and not 0 <= area < math.inf:
        raise ValueError(f"area is {area}; expected a number of pixels, at least 0")
    counts = encode_segmentation(entry["segmentation"], image.size)
    annotation = Annotation(label_id, counts, crowd=crowd == 1, area=area) if counts else None
    return coco_id, image, annotation


def field_of(entry: Mapping[str, Any], key: str, *kinds: type[T]) -> T:
    """A field of exactly one of these types: `True` is no integer.

    Raises:
        KeyError, ValueError: it is missing, or of another type.
    """
    value = entry[key]
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{key} is {short_repr(value)}, not of type {names}")
    return value
