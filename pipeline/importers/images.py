"""Images that files of others name, found again among the images of our sources.

Only what a source lists is ever opened, whatever a name says.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from pipeline.engine.parallel import Workers
from pipeline.errors import PipelineError
from pipeline.formats.images import FORMATS, ImageError, upright_size
from pipeline.formats.sources import ImageRef, SourceSpec, list_images, read_image

READ_AHEAD = 256

Prefixes = Sequence[tuple[str, str]]


class ImageFacts(NamedTuple):
    """What the tables keep of an image file; `error` says why there is nothing else to keep."""

    num_bytes: int | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Matches:
    """Names and the images they stand for.

    Attributes:
        found: name -> image, in the order of the sources.
        lost: (name, reason) of the others, in the order of the names, fit for print.
        num_listed: number of images of the sources.
    """

    found: dict[str, ImageRef]
    lost: list[tuple[str, str]]
    num_listed: int


def parse_prefixes(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs (old, new) of texts `OLD=NEW`, without slashes at their ends.

    Raises:
        PipelineError: no `=`, nothing before it, or one OLD twice.
    """
    prefixes: dict[str, str] = {}
    for text in texts:
        old, separator, new = text.partition("=")
        if not separator or not old:
            raise PipelineError(f"--prefix: {text!r}: expected OLD=NEW, as in /their/data=data")
        old = old.rstrip("/")
        if old in prefixes:
            raise PipelineError(f"--prefix: {old!r} is given twice; leave one out")
        prefixes[old] = new.rstrip("/") if new != "/" else new
    return list(prefixes.items())


def replace_prefix(name: str, prefixes: Prefixes) -> str:
    """A path with the longest of the old leading folders that it has replaced by the new one."""
    matching = [pair for pair in prefixes if name.startswith(f"{pair[0]}/")]
    if not matching:
        return name
    old, new = max(matching, key=lambda pair: len(pair[0]))
    return posixpath.join(new, name.removeprefix(f"{old}/"))


def find_images(
    names: Iterable[str], sources: Mapping[str, SourceSpec], *, prefixes: Prefixes = ()
) -> Matches:
    """Find the image of each name.

    A name is the path of a file (from here, or absolute), a bare file name, which then has to be
    unique, or for tars the member with or without its extension (clip-retrieval's sample key).

    Args:
        names: as the other file has them; a repeated name counts once.
        sources: where to look, by name; those of format `parquet` have no file names.
        prefixes: see `replace_prefix`; applied first.

    Raises:
        PipelineError: a source cannot be listed or is of format `parquet`.
    """
    wanted: dict[str, list[str]] = {}
    matches: dict[str, dict[str, ImageRef]] = {}
    unique_names = dict.fromkeys(names)
    for name in unique_names:
        for alias in _aliases_of_name(replace_prefix(name, prefixes)):
            wanted.setdefault(alias, []).append(name)
    num_listed = 0
    for source_name, source in sources.items():
        if source.format == "parquet":
            raise PipelineError(
                f"index.{source_name}.format: images in Parquet files have no names to find them "
                "by; import for sources of format folder or webdataset, and embed the others"
            )
        for ref in list_images(source_name, source):
            num_listed += 1
            for alias in _aliases_of_image(ref):
                for name in wanted.get(alias, ()):
                    matches.setdefault(name, {})[ref.key] = ref
    found = {name: next(iter(refs.values())) for name, refs in matches.items() if len(refs) == 1}
    lost = [
        (
            name.encode(errors="backslashreplace").decode(),
            f"{len(matches[name])} images have this name" if name in matches else "no such image",
        )
        for name in unique_names
        if name not in found
    ]
    return Matches(found=found, lost=lost, num_listed=num_listed)


def _aliases_of_name(name: str) -> set[str]:
    if "/" not in name:
        return {name}
    normal = posixpath.normpath(name)
    return {normal, posixpath.abspath(normal)}


def _aliases_of_image(ref: ImageRef) -> set[str]:
    if ref.member is None:
        return {posixpath.abspath(ref.path), posixpath.basename(ref.path)}
    folder, base_name = posixpath.split(ref.member)
    stem = base_name.partition(".")[0]
    return {ref.member, base_name, stem, posixpath.join(folder, stem)}


def read_all(
    refs: Iterable[ImageRef], *, max_pixels: int, workers: int
) -> Iterator[tuple[ImageRef, ImageFacts]]:
    """Read images in order, a few hundred ahead of their use; see `read_facts`."""

    def read(ref: ImageRef) -> tuple[ImageRef, ImageFacts]:
        return ref, read_facts(ref, max_pixels=max_pixels)

    with Workers(max(1, workers)) as pool:
        yield from pool.map(read, refs, ahead=READ_AHEAD)


def read_facts(ref: ImageRef, *, max_pixels: int) -> ImageFacts:
    """Hash an image and read its size from its header.

    Pixels are not decoded: that a file is cut off shows in the stage that decodes it. The size is
    that of the upright image.
    """
    try:
        data = read_image(ref)
    except ImageError as error:
        return ImageFacts(error=str(error))
    num_bytes, sha256 = len(data), hashlib.sha256(data).hexdigest()
    try:
        width, height = _upright_size(data, max_pixels)
    except ImageError as error:
        return ImageFacts(num_bytes, sha256, error=str(error))
    return ImageFacts(num_bytes, sha256, width, height)


def _upright_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = upright_size(image)
    except UnidentifiedImageError:
        raise ImageError("not an image" if data else "empty file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("too large") from None
    except Exception as error:  # parsers answer hostile bytes with any exception
        raise ImageError(f"damaged: {type(error).__name__}") from None
    if not 0 < width * height <= max_pixels:
        raise ImageError(f"too large: {width}x{height}")
    return width, height
