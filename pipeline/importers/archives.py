"""The published archives -> our table of archives.

The published ZUTIS code keeps them as JSON: category -> paths of its images, most similar first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.engine.progress import StageRun
from pipeline.errors import PipelineError, listing
from pipeline.files import read_json
from pipeline.formats.sources import ImageRef, SourceSpec, image_name
from pipeline.formats.tables import ArchiveRow, write_archives
from pipeline.importers.images import ImageFacts, Prefixes, find_images, read_all
from pipeline.retrieval.ranking import Ranking, count_losses, settle_overlaps

UNKNOWN_SIMILARITY = float("nan")
LISTED_NAMES = 20


def run(
    *,
    json_path: Path,
    out_path: Path,
    categories: Sequence[str],
    sources: Mapping[str, SourceSpec],
    k: int,
    overlap: str,
    prefixes: Prefixes,
    max_pixels: int,
    workers: int,
    stats_path: Path,
) -> None:
    """Write the archives that a published JSON file names.

    Ranks are the places in the file's lists; its similarities are not known and become NaN. An
    image that is no image of the sources, or cannot be read, is skipped and listed, and leaves a
    gap in the ranks. Of an image that one list names twice the first place counts.

    Args:
        json_path: the published file.
        out_path: Parquet file of the archives.
        categories: K names; label ids are their positions from 1. The file has to have the same
            names, in any order.
        sources: index datasets by name; keys of the images are those that embedding gives them.
        k: images taken of each list, from its head.
        overlap: policy on images of several categories, as in the stage retrieve; without
            similarities, `best` goes by the place in the lists.
        prefixes: (old, new) leading folders of the paths.
        max_pixels: largest accepted image.
        workers: threads that read images.
        stats_path: JSON file of the counts. `dropped`: entries that the policy took out;
            `duplicates`: entries whose image stood in the same list before; `empty_archives`.

    Raises:
        PipelineError: the file is no such JSON, its categories are not those given, or none of
            its images can be used.
    """
    lists = _read_lists(json_path, categories)
    heads = [paths[:k] for paths in lists]
    names = dict.fromkeys(path for paths in heads for path in paths)
    if not names:
        raise PipelineError(f"{json_path}: all lists are empty")
    with StageRun("import archives", stats_path=stats_path, total=len(names)) as stage_run:
        matches = find_images(names, sources, prefixes=prefixes)
        for path, reason in matches.lost:
            stage_run.skip(path, reason)
        images = _readable(matches.found, stage_run, max_pixels=max_pixels, workers=workers)
        if not images:
            first = stage_run.skipped[0]
            raise PipelineError(
                f"{json_path}: none of its {len(names)} images can be used; the first is "
                f"{first['item']}: {first['reason']}; the sources are {_roots(sources)}; for other "
                "folders use --prefix OLD=NEW"
            )
        positions = {key: position for position, key in enumerate(images)}
        place_of = {name: positions.get(ref.key) for name, ref in matches.found.items()}
        ranked = [_entries(paths, place_of, stage_run) for paths in heads]
        archives = settle_overlaps(ranked, overlap)
        count_losses(stage_run, categories, ranked, archives)
        write_archives(out_path, _rows(categories, archives, list(images.values())))


def _read_lists(path: Path, categories: Sequence[str]) -> list[list[str]]:
    """The file's lists of paths, in the order of the categories."""
    try:
        content = read_json(path)
    except RecursionError:
        raise PipelineError(f"{path}: nested too deeply to be a list of archives") from None
    if not isinstance(content, dict):
        raise PipelineError(
            f"{path}: expected an object of category -> list of paths, found "
            f"{type(content).__name__}"
        )
    for name, paths in content.items():
        if not isinstance(paths, list) or not all(isinstance(item, str) for item in paths):
            raise PipelineError(f"{path}: {name!r}: expected a list of image paths")
    _check_categories(path, content, categories)
    return [content[name] for name in categories]


def _check_categories(path: Path, found: Collection[str], wanted: Collection[str]) -> None:
    differences = {
        "the file lacks": [name for name in wanted if name not in found],
        "the params lack": [name for name in found if name not in wanted],
    }
    messages = [
        f"{what} {listing(list(map(repr, names)), LISTED_NAMES)}"
        for what, names in differences.items()
        if names
    ]
    if messages:
        raise PipelineError(
            f"{path}: its categories are not those of the params: {'; '.join(messages)}; make "
            "`categories` name the same"
        )


def _readable(
    found: Mapping[str, ImageRef], stage_run: StageRun, *, max_pixels: int, workers: int
) -> dict[str, tuple[ImageRef, ImageFacts]]:
    """The images that can be read, by sample key."""
    refs = {ref.key: ref for ref in found.values()}
    images: dict[str, tuple[ImageRef, ImageFacts]] = {}
    for ref, facts in read_all(refs.values(), max_pixels=max_pixels, workers=workers):
        if facts.error:
            stage_run.skip(image_name(ref), facts.error)
        else:
            images[ref.key] = ref, facts
            stage_run.advance()
    return images


def _entries(
    paths: Sequence[str], place_of: Mapping[str, int | None], stage_run: StageRun
) -> Ranking:
    """One category's list: ranks, and places of the images among those that can be read.

    The rank stands in for the similarity: the higher, the smaller.
    """
    ranks: dict[int, int] = {}
    for rank, path in enumerate(paths, start=1):
        place = place_of.get(path)
        if place is not None and ranks.setdefault(place, rank) != rank:
            stage_run.count("duplicates")
    places = np.fromiter(ranks, np.int64)
    numbers = np.fromiter(ranks.values(), np.int64)
    return Ranking(numbers, -numbers.astype(np.float32), places)


def _rows(
    categories: Sequence[str],
    archives: Sequence[Ranking],
    images: Sequence[tuple[ImageRef, ImageFacts]],
) -> Iterator[ArchiveRow]:
    for label_id, (category, part) in enumerate(zip(categories, archives, strict=True), 1):
        for rank, position in zip(part.ranks.tolist(), part.positions.tolist(), strict=True):
            ref, facts = images[position]
            assert facts.width
            assert facts.height
            assert facts.sha256
            yield ArchiveRow(
                category=category,
                label_id=label_id,
                rank=rank,
                key=ref.key,
                similarity=UNKNOWN_SIMILARITY,
                source=ref.source,
                path=ref.path,
                member=ref.member,
                offset=ref.offset,
                width=facts.width,
                height=facts.height,
                sha256=facts.sha256,
            )


def _roots(sources: Mapping[str, SourceSpec]) -> str:
    return ", ".join(f"{name} ({source.root})" for name, source in sources.items())
