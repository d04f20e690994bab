"""Open the folder of this script in FiftyOne (`pip install fiftyone`): `python open_fiftyone.py`.

The first run makes a dataset, which FiftyOne keeps; later runs open it with all tags and views.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
BATCH = 1000  # samples that are held at a time
AFTER_EDGE = 1e-3  # pixels


def main() -> None:
    """Make the dataset, if there is none yet, and open it in a browser."""
    options = _options()
    try:
        import fiftyone as fo
    except ImportError as error:
        sys.exit(f"{error}; pip install fiftyone")
    dataset = fo.load_dataset(options.name) if fo.dataset_exists(options.name) else None
    if dataset is not None and dataset.info.get("folder") != str(FOLDER):
        sys.exit(
            f"{options.name}: a dataset of another folder has this name; choose another --name"
        )
    if dataset is not None and options.again:
        fo.delete_dataset(options.name)
        dataset = None
    dataset = dataset or make_dataset(fo, options.name)
    print(dataset)
    if not options.no_app:
        fo.launch_app(dataset).wait()


def make_dataset(fo: Any, name: str) -> Any:
    """A dataset of FiftyOne that stays in its database, of all samples of the folder."""
    dataset = fo.Dataset(name)
    dataset.info = {"folder": str(FOLDER)}
    names = json.loads((FOLDER / "categories.json").read_text(encoding="utf-8"))
    void = 255 if len(names) < 255 else 65535
    dataset.default_mask_targets = {**dict(enumerate(["background", *names])), void: "void"}
    rows = json.loads((FOLDER / "samples.json").read_text(encoding="utf-8"))
    for start in range(0, len(rows), BATCH):
        dataset.add_samples([_sample(fo, row) for row in rows[start : start + BATCH]])
    dataset.persistent = True  # last: one that was stopped half-way is gone with its process
    return dataset


def _sample(fo: Any, row: dict[str, Any]) -> Any:
    sample = fo.Sample(filepath=str(FOLDER / row["image"]), tags=[row["split"]])
    for field, fact in row["facts"].items():
        sample[field] = fact
    for field, items in row["objects"].items():
        detections = [_detection(fo, found, row["size"]) for found in items]
        sample[field] = fo.Detections(detections=detections)
    if row["semantic"] is not None:
        sample["semantic"] = fo.Segmentation(mask_path=str(FOLDER / row["semantic"]))
    return sample


def _detection(fo: Any, found: dict[str, Any], size: list[int]) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(found["mask"]))) as png:
        mask = np.array(png) > 0
    return fo.Detection(
        label=found["label"],
        bounding_box=relative_box(found["box"], size),
        mask=mask,
        confidence=found["score"],
    )


def relative_box(box: list[int], size: list[int]) -> list[float]:
    """Left, top, width, height as shares of an image's width and height.

    FiftyOne multiplies them and rounds down, so that a corner must not lie just before its pixel.
    """
    left, top, width, height = box
    return [
        (left + AFTER_EDGE) / size[0],
        (top + AFTER_EDGE) / size[1],
        width / size[0],
        height / size[1],
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default=FOLDER.name, help="of the dataset; default: the folder's")
    parser.add_argument("--again", action="store_true", help="make it anew, without its tags")
    parser.add_argument("--no-app", action="store_true", help="only make it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
