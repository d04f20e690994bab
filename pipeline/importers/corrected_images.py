"""Which images of ours the images of a tool's file are.

By the content of the images that were corrected, where their folder is given; else by the hash of
it that the tool's file states, or by the longest end of a path that is shared.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from pipeline.benchmarks.lists import check_folder
from pipeline.formats.images import ImageError, encode_jpeg, is_plain_jpeg, load_image, read_file
from pipeline.formats.shards import open_samples
from pipeline.importers.tool_files import Size, ToolImage


class UnusableError(Exception):
    """Why an image of a tool's file cannot be used."""


class Found(NamedTuple):
    """The image that a tool's image is.

    Attributes:
        sha256: of its file's content.
        name: what messages call it.
        sizes: (H, W) that masks of it may have, the image's own first.
    """

    sha256: str
    name: str
    sizes: Sequence[Size]


class _Ends:
    """What is found by the ends of paths."""

    def __init__(self) -> None:
        self._by_name: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)

    def add(self, path: str, value: str) -> None:
        """Let a path stand for a value."""
        parts = PurePosixPath(path).parts
        if parts:
            self._by_name[parts[-1]].append((parts, value))

    def find(self, path: str) -> set[str]:
        """The values of the paths that share the longest end with this one."""
        parts = PurePosixPath(path).parts
        candidates = self._by_name.get(parts[-1], []) if parts else []
        shared = [_num_shared(parts, others) for others, _ in candidates]
        longest = max(shared, default=0)
        return {
            value for (_, value), count in zip(candidates, shared, strict=True) if count == longest
        }

    def only(self, names: Sequence[str], where: str) -> str:
        """The value of the first of some names that has any.

        Raises:
            UnusableError: there is none, or several.
        """
        found = next(filter(None, map(self.find, names)), set())
        if not found:
            raise UnusableError(f"no image of this name in {where}")
        if len(found) > 1:
            raise UnusableError(f"{len(found)} images of this name in {where}")
        return next(iter(found))


def _num_shared(first: Sequence[str], second: Sequence[str]) -> int:
    """Parts that two paths share at their ends."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@dataclass(frozen=True)
class Photo:
    """The file of an image that was corrected.

    Attributes:
        name: its path below the folder.
        data: its content.
    """

    name: str
    data: bytes

    @cached_property
    def sha256(self) -> str:
        """Of the content."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def image(self) -> Image.Image:
        """RGB, upright.

        Raises:
            UnusableError: it cannot be read.
        """
        try:
            return load_image(self.data)
        except ImageError as error:
            raise UnusableError(str(error)) from None

    @property
    def sizes(self) -> list[Size]:
        """(H, W) that masks of it may have."""
        return [(self.image.height, self.image.width)]

    @cached_property
    def jpeg(self) -> bytes:
        """The content, where that is a plain JPEG, else that of one."""
        is_plain = is_plain_jpeg(self.data, self.image)
        return self.data if is_plain else encode_jpeg(self.image)


class ImageFolder:
    """Images that were corrected, by the names that a tool has for them."""

    def __init__(self, folder: Path) -> None:
        check_folder(folder, "the images that were corrected")
        self._folder = folder
        self._ends = _Ends()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self._ends.add(name, name)

    def photo(self, image: ToolImage) -> Photo:
        """Its file.

        Raises:
            UnusableError: there is none, there are several, or it cannot be read.
        """
        name = self._ends.only(image.names, str(self._folder))
        try:
            return Photo(name, read_file(self._folder / name))
        except ImageError as error:
            raise UnusableError(str(error)) from None


class ArchiveImages:
    """The images of mask shards, by content or by the ends of their paths."""

    def __init__(self, masks_dir: Path, images_dir: Path | None) -> None:
        self._masks_dir = masks_dir
        self._folder = None if images_dir is None else ImageFolder(images_dir)
        self._store = open_samples(masks_dir, members=("jpg", "json"))
        self._index: dict[str, int] = {}
        self._ends = _Ends()
        for index, key in enumerate(self._store.keys):
            fields = self._store.json(index)
            content = fields["sha256"]
            self._index.setdefault(content, index)
            for name in (content, fields["member"] or fields["path"], key, fields["key"]):
                self._ends.add(name, content)

    def find(self, image: ToolImage) -> Found:
        """The archives' image that a tool's image is.

        Raises:
            UnusableError: there is none, or there are several.
        """
        where = f"the archives ({self._masks_dir})"
        if self._folder is None:
            stated = [image.sha256] if image.sha256 else []
            stems = [PurePosixPath(name).stem for name in image.names]  # of samples: their keys
            found = self._ends.only([*stated, *image.names, *stems], where)
        else:
            content = self._folder.photo(image).sha256
            found = content if content in self._index else self._whole.get(content, "")
            if not found:
                raise UnusableError(f"no image of this content in {where}")
        index = self._index[found]
        fields = self._store.json(index)
        sizes = [
            (fields["original_height"], fields["original_width"]),
            load_image(self._store.member(index, "jpg")).size[::-1],
        ]
        return Found(found, fields["member"] or fields["path"], sizes)

    @cached_property
    def _whole(self) -> Mapping[str, str]:
        """Hash of an image as the shards have it, perhaps shrunk -> that of its file."""
        return {
            hashlib.sha256(self._store.member(index, "jpg")).hexdigest(): content
            for content, index in self._index.items()
        }
