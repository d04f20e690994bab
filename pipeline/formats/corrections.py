"""Masks that a person has corrected: what is true of some images of the archives.

A folder has one JSON file an image, SHA256.json by the SHA-256 of the image's file content, and
`manifest.json`, which lists them. A file holds `name` and `size` [H, W] of the image, its
`objects`, each a `category` by name and a run-length coded `mask`, and `void`, the mask of what
nobody has said anything of, or null. Text and no pixels: a git repository shows what has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.files import digest, read_json, write_json
from pipeline.formats.images import resize_nearest
from pipeline.formats.labels import BACKGROUND, IGNORE_INDEX, LABEL_TYPE, LabelMap
from pipeline.formats.rle import Rle, decode_mask, encode_segmentation, mask_area
from pipeline.formats.shards import SampleStore

MANIFEST = "manifest.json"
BACKGROUND_NAME = "background"  # an object of this name says that there is none
HEX_DIGITS = frozenset("0123456789abcdef")
SHA256_DIGITS = 64


@dataclass(frozen=True)
class CorrectedObject:
    """One object.

    Attributes:
        category: its name.
        mask: run-length code of the image's size, with at least one pixel.
    """

    category: str
    mask: Rle


@dataclass(frozen=True)
class Correction:
    """What is true of one image.

    Attributes:
        sha256: of the content of the image's file.
        name: what messages call the image.
        size: (H, W) of the masks, which may be those of the image when it was shrunk.
        objects: all of its objects; none in an image that shows no category.
        void: what nobody has said anything of.
    """

    sha256: str
    name: str
    size: tuple[int, int]
    objects: Sequence[CorrectedObject] = ()
    void: Rle | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it shows no object."""
        return all(it.category == BACKGROUND_NAME for it in self.objects)

    def maps(
        self, label_ids: Mapping[str, int], size: tuple[int, int] | None = None
    ) -> tuple[LabelMap, NDArray[np.uint16]]:
        """Label ids (H, W) and the numbers (H, W) of the objects from 1, each with a pixel.

        Of several objects at one pixel the smallest is seen. Void pixels are `IGNORE_INDEX` and of
        no object; so are those of objects of other names than those of `label_ids`.

        Args:
            label_ids: label ids from 1 by name.
            size: (H, W) of the result, to the nearest neighbour; the masks' own by default.
        """
        known = {**label_ids, BACKGROUND_NAME: BACKGROUND}
        semantic = np.full(self.size, BACKGROUND, dtype=LABEL_TYPE)
        numbers = np.zeros(self.size, dtype=np.uint16)
        painted = sorted(self.objects, key=lambda it: -mask_area(it.mask))
        for number, it in enumerate(painted, start=1):
            mask, label_id = decode_mask(it.mask), known.get(it.category, IGNORE_INDEX)
            semantic[mask] = label_id
            numbers[mask] = number if label_id > BACKGROUND else 0
        if self.void is not None:
            void = decode_mask(self.void)
            semantic[void], numbers[void] = IGNORE_INDEX, 0
        if size is not None:
            semantic, numbers = resize_nearest(semantic, size), resize_nearest(numbers, size)
        return semantic, _numbered(numbers)

    def as_json(self) -> dict[str, Any]:
        """The content of its file."""
        return {
            "sha256": self.sha256,
            "name": self.name,
            "size": list(self.size),
            "objects": [{"category": it.category, "mask": it.mask} for it in self.objects],
            "void": self.void,
        }


class Corrections:
    """The corrections of a folder; of a folder that is not there, none.

    Args:
        folder: see above.

    Raises:
        PipelineError: a file of the manifest is missing or damaged.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._by_image: dict[str, Correction] = {}
        if folder is not None and folder.exists():
            for sha256 in _read_manifest(folder):
                self._by_image[sha256] = _read(folder / f"{sha256}.json", sha256)

    def __len__(self) -> int:
        return len(self._by_image)

    def __iter__(self) -> Iterator[Correction]:
        """All of them, by the image's SHA-256."""
        return iter(self._by_image.values())

    def get(self, sha256: str) -> Correction | None:
        """That of an image, by the SHA-256 of its file's content."""
        return self._by_image.get(sha256)

    def of_samples(self, store: SampleStore) -> dict[int, Correction]:
        """Index of a sample -> correction of its image, for those that have one."""
        if not self._by_image:
            return {}
        images = (store.json(index).get("sha256", "") for index in range(len(store)))
        return {
            index: self._by_image[sha256]
            for index, sha256 in enumerate(images)
            if sha256 in self._by_image
        }


def fingerprint(corrections: Iterable[Correction]) -> str:
    """Digest of what some corrections say, whatever their order."""
    return digest({it.sha256: it.as_json() for it in corrections})


def further_samples(corrections: Mapping[int, Correction]) -> set[int]:
    """Of the samples (index -> correction) of one image all but the first."""
    first = {it.sha256: index for index, it in sorted(corrections.items(), reverse=True)}
    return corrections.keys() - first.values()


def write_corrections(folder: Path, corrections: Iterable[Correction]) -> None:
    """Add corrections to a folder; those of the same images are replaced, the others stay.

    Raises:
        PipelineError: its manifest is damaged.
    """
    entries = _read_manifest(folder) if folder.exists() else {}
    for it in corrections:
        write_json(folder / f"{it.sha256}.json", it.as_json())
        entries[it.sha256] = it.name
    write_json(folder / MANIFEST, {"images": dict(sorted(entries.items()))})


def _read_manifest(folder: Path) -> dict[str, str]:
    """Names of the corrected images by SHA-256, in the order of these."""
    path = folder / MANIFEST
    if not any(folder.iterdir()):
        return {}
    content = read_json(path) if path.exists() else None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, dict) or not all(map(_is_sha256, images)):
        raise PipelineError(
            f"{path}: not a manifest of corrections; take it from git again (git checkout), or "
            'write {"images": {}} and import them anew'
        )
    return dict(sorted(images.items()))


def _is_sha256(text: str) -> bool:
    return len(text) == SHA256_DIGITS and set(text) <= HEX_DIGITS


def _read(path: Path, sha256: str) -> Correction:
    if not path.is_file():
        raise PipelineError(
            f"{path}: listed in {MANIFEST}, but missing; import it again, or remove its line there"
        )
    content = read_json(path)
    try:
        height, width = content["size"]
        size = (int(height), int(width))
        return Correction(
            sha256,
            str(content["name"]),
            size,
            [
                CorrectedObject(str(it["category"]), _rle(it["mask"], size))
                for it in content["objects"]
            ],
            None if content["void"] is None else _rle(content["void"], size),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(
            f"{path}: not a correction ({error}); import it again with --force"
        ) from None


def _rle(stored: Any, size: tuple[int, int]) -> Rle:
    """A stored run-length code, checked: pycocotools leaves what damaged ones decode to to chance.

    Raises:
        KeyError, ValueError: it does not fit, or has no pixel.
    """
    counts = encode_segmentation(stored, size)
    if counts is None:
        raise ValueError("a mask without a pixel")
    return {"size": list(size), "counts": counts.decode("ascii")}


def _numbered(numbers: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The same without gaps: 0 stays, those that have a pixel become 1, 2, ..."""
    present = np.unique(numbers[numbers > 0])
    table = np.zeros(int(numbers.max(initial=0)) + 1, dtype=np.uint16)
    table[present] = np.arange(1, len(present) + 1)
    return table[numbers]
