"""Which images a benchmark has: lists of ids, folders of files, groups."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.errors import PipelineError

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def check_folder(path: Path, expected: str) -> None:
    """Raise if `path` is no folder; `expected` says what should be in it."""
    if not path.is_dir():
        raise PipelineError(f"{path}: no such folder; expected {expected}")


def read_lines(path: Path, expected: str) -> list[str]:
    """Lines of a text file without surrounding blanks; empty ones are left out.

    Raises:
        PipelineError: it cannot be read, is not text, or holds nothing; `expected` says what should
            be.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PipelineError(f"{path}: no such file; expected {expected}") from None
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise PipelineError(f"{path}: {problem}; expected {expected}") from None
    text = _decode(content)
    if text is None:
        found = " but in UTF-16" if content.startswith(UTF16_MARKS) else ""
        raise PipelineError(
            f"{path}: not a text file in UTF-8{found}; save it as UTF-8; expected {expected}"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise PipelineError(f"{path}: empty; expected {expected}")
    return lines


def read_ids(path: Path) -> list[str]:
    """Image ids of a list, one a line.

    Raises:
        PipelineError: no such file, not text, empty, an id twice, or a line that is no file stem.
    """
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob(f"*{path.suffix}")))
        raise PipelineError(f"{path}: no such file; lists in that folder: {known or 'none'}")
    ids = read_lines(path, "one image id a line")
    seen: set[str] = set()
    for image_id in ids:
        if image_id in seen:
            raise PipelineError(f"{path}: image {image_id} is listed twice")
        if Path(image_id).name != image_id:
            raise PipelineError(f"{path}: {image_id!r} is not an image id; expected a file stem")
        seen.add(image_id)
    return ids


def read_groups(
    groups: Mapping[str, str],
    list_path: Callable[[str], Path],
    image_ids: Iterable[str],
    split: str,
) -> dict[str, frozenset[str]]:
    """Groups of images that are scored apart.

    Args:
        groups: name of a group -> name of its list.
        list_path: turns the name of a list into its file.
        image_ids: all images of the split.
        split: name of the split, for the messages.

    Raises:
        PipelineError: as `read_ids`, or a list names an image that is not in the split.
    """
    if not groups:
        return {}
    known = frozenset(image_ids)
    read = {}
    for name, list_name in groups.items():
        path = list_path(list_name)
        read[name] = frozenset(read_ids(path))
        unknown = sorted(read[name] - known)
        if unknown:
            raise PipelineError(
                f"{path}: group {name!r} holds {len(unknown)} images that are not in split "
                f"{split!r}, for example {unknown[0]}"
            )
    return read


def check_files(folder: Path, names: Iterable[str], reason: str) -> None:
    """Raise for the first name that is no entry of `folder`; `reason` says why it should be."""
    present = frozenset(_entries(folder))
    for name in names:
        if name not in present:
            raise PipelineError(f"{folder / name}: no such file, but {reason}")


def file_stems(folder: Path, suffix: str) -> list[str]:
    """Names in `folder` that end with `suffix`, without it, sorted; hidden files are left out."""
    return sorted(
        name.removesuffix(suffix)
        for name in _entries(folder)
        if name.endswith(suffix) and not name.startswith(".")
    )


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        )


def paired_stems(
    image_dir: Path, mask_dir: Path, folders: Sequence[str], *, image_suffix: str
) -> list[tuple[str, str]]:
    """Folder and stem of every image and its PNG mask, in order.

    Args:
        image_dir: holds FOLDER/STEM + `image_suffix`.
        mask_dir: holds FOLDER/STEM.png.
        folders: names of the folders.
        image_suffix: with its dot.

    Raises:
        PipelineError: an image without mask, a mask without image, or no image at all.
    """
    pairs: list[tuple[str, str]] = []
    for folder in folders:
        check_folder(mask_dir / folder, f"the masks of {image_dir / folder}")
        stems = file_stems(image_dir / folder, image_suffix)
        masks = file_stems(mask_dir / folder, ".png")
        for stem in sorted(set(stems) ^ set(masks)):
            image = image_dir / folder / f"{stem}{image_suffix}"
            mask = mask_dir / folder / f"{stem}.png"
            missing, present = (mask, image) if stem in stems else (image, mask)
            raise PipelineError(f"{missing}: no such file; it belongs to {present}")
        pairs.extend((folder, stem) for stem in stems)
    if not pairs:
        raise PipelineError(f"{image_dir}: no {image_suffix} file in its folders")
    return pairs


def joined_id(*parts: str) -> str:
    """An image id that is safe as a file name, of the folders and the stem of an image."""
    return "__".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in parts)


def check_unique(image_ids: Iterable[str], root: Path) -> None:
    """Raise if two images of the benchmark at `root` have the same id."""
    seen: set[str] = set()
    for image_id in image_ids:
        if image_id in seen:
            raise PipelineError(f"{root}: two images have the id {image_id}; rename one")
        seen.add(image_id)


def _decode(content: bytes) -> str | None:
    """Text in UTF-8, with or without a byte order mark; None for anything else."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text  # as UTF-16 without its mark has


def _entries(folder: Path) -> list[str]:
    """Names of all entries, without looking at the files themselves."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]
