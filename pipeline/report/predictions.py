"""Pictures of predictions that `evaluate` drew: the best, the worst, and typical ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.formats.images import ImageError, load_image
from pipeline.pictures.report import fit_image, picture
from pipeline.report.inputs import is_number, is_wanted, score

INDEX = "index.json"
PER_KIND, IN_ALL = 3, 16
SIDE, MAX_BYTES = 1200, 80_000
ADVICE = "run `pipeline evaluate` again"


def read_best_and_worst(
    overlays_dir: Path, names: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Best and worst predictions of every benchmark, or of those in `names`.

    Raises:
        PipelineError: an index of pictures, or a picture, is damaged.
    """
    folders = _folders(overlays_dir, names)
    shown = min(PER_KIND, max(1, IN_ALL // (2 * max(1, len(folders)))))
    benches = []
    for folder in folders:
        kinds = {kind: _entries(folder, kind)[:shown] for kind in ("best", "worst")}
        pictures = {
            kind: [_picture(folder, entry) for entry in entries] for kind, entries in kinds.items()
        }
        benches.append({"name": folder.name, "kinds": pictures})
    return benches


def read_typical(overlays_dir: Path, names: Collection[str] | None = None) -> dict[str, Any]:
    """Two predictions of the first benchmark, neither its best nor its worst.

    Of the images that `evaluate` picks evenly, those at one and two thirds of the order by mIoU.

    Returns:
        Benchmark, number of images picked, pictures; empty where no picked image has a score.

    Raises:
        PipelineError: an index of pictures, or a picture, is damaged.
    """
    for folder in _folders(overlays_dir, names):
        picked = [entry for entry in _entries(folder, "spread") if is_number(entry["miou"])]
        if picked:
            picked.sort(key=lambda entry: -entry["miou"])
            places = sorted({len(picked) // 3, 2 * len(picked) // 3})
            pictures = [_picture(folder, picked[place]) for place in places]
            return {"name": folder.name, "num_picked": len(picked), "pictures": pictures}
    return {}


def read_side_by_side(
    overlays_dir: Path, titles: Mapping[str, str], *, count: int
) -> list[list[dict[str, Any]]]:
    """The same images as several networks see them, neither the best nor the worst.

    Of the images that were picked evenly and drawn for all, those that part the order by mIoU of
    the last network into equal shares.

    Args:
        overlays_dir: a folder a network.
        titles: captions by the name of the folder.
        count: number of images.

    Returns:
        An image each: its pictures with `title`, in the order of `titles`.

    Raises:
        PipelineError: an index of pictures, or a picture, is damaged.
    """
    folders = [overlays_dir / name for name in titles]
    if not folders or not all((folder / INDEX).is_file() for folder in folders):
        return []
    drawn = [{it["image_id"]: it for it in _entries(folder, "spread")} for folder in folders]
    shared = [it for key, it in drawn[-1].items() if all(key in other for other in drawn)]
    picked = sorted((it for it in shared if is_number(it["miou"])), key=lambda it: -it["miou"])
    places = sorted({(slot + 1) * len(picked) // (count + 1) for slot in range(count)})
    return [
        [
            _picture(folder, entries[picked[place]["image_id"]], of=title) | {"title": title}
            for folder, entries, title in zip(folders, drawn, titles.values(), strict=True)
        ]
        for place in places
        if picked
    ]


def _folders(overlays_dir: Path, names: Collection[str] | None) -> list[Path]:
    folders = sorted(path.parent for path in overlays_dir.glob(f"*/{INDEX}"))
    return [folder for folder in folders if is_wanted(folder.name, names)]


def _entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / INDEX
    entries = read_json(path)
    try:
        if all({"file", "image_id", "miou"} <= entry.keys() for entry in entries):
            return [entry for entry in entries if entry["kind"] == kind]
    except (AttributeError, KeyError, TypeError):
        pass
    raise PipelineError(
        f"{path}: expected a list of objects with file, image_id, miou and kind; {ADVICE}"
    )


def _picture(folder: Path, entry: Mapping[str, Any], *, of: str = "Prediction") -> dict[str, Any]:
    try:
        image = fit_image(load_image(folder / entry["file"]), SIDE)
    except ImageError as error:
        raise PipelineError(f"{folder / entry['file']}: {error}; {ADVICE}") from None
    shown = picture(image, alt=f"{of} on image {entry['image_id']}", max_bytes=MAX_BYTES)
    return shown | {"image_id": entry["image_id"], "miou": score(entry["miou"])}
