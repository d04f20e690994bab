"""DenseCLIP+ beside the network of `train`: its scores and its teacher's, curves, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.params.benches import BenchSection
from pipeline.report.charts import line_chart
from pipeline.report.curves import read_points
from pipeline.report.inputs import encoder_name, integer, read_object
from pipeline.report.predictions import read_side_by_side
from pipeline.report.scores import bench_columns, score_row
from pipeline.report.wording import PLUS_ROWS

if TYPE_CHECKING:
    from pipeline.params.sections import PlusParams

SCORES_NAME = "scores.json"
WATCHED = ("loss", "agreement", "entropy")
SHARE = "share_"
MAX_SHARES = 6
IMAGES, IMAGES_IN_ALL = 3, 8


def read_plus(
    plus_dir: Path, params: Mapping[str, PlusParams] | None = None
) -> list[dict[str, Any]]:
    """What `pipeline plus` left of every entry.

    Args:
        plus_dir: a folder an entry.
        params: the entries to show; None: all that there are.

    Returns:
        Name, words on its training, table of scores, curves, rows of pictures; an entry that has no
        scores yet is left out.

    Raises:
        PipelineError: one of the files is damaged.
    """
    names = sorted(path.parent.name for path in plus_dir.glob(f"*/{SCORES_NAME}"))
    if params is not None:
        names = [name for name in params if name in names]
    count = min(IMAGES, max(1, IMAGES_IN_ALL // max(1, len(names))))
    return [
        _entry(plus_dir / name, params[name] if params else None, num_images=count)
        for name in names
    ]


def _entry(folder: Path, params: PlusParams | None, *, num_images: int) -> dict[str, Any]:
    scores = read_object(folder / SCORES_NAME)
    titles = {key: title for key, title in PLUS_ROWS.items() if isinstance(scores.get(key), dict)}
    if not titles:
        raise PipelineError(
            f"{folder / SCORES_NAME}: expected scores of {', '.join(PLUS_ROWS)}; run "
            f"`pipeline plus --name {folder.name}` again"
        )
    rows = [score_row(title, scores[key]) for key, title in titles.items()]
    switch = _switch(params) if params else None
    return {
        "name": folder.name,
        "words": _words(params) if params else "",
        "rows": rows,
        "columns": bench_columns([{"rows": rows}]),
        "switch": switch,
        **_curves(folder / "live/plots/metrics/train", switch),
        "images": read_side_by_side(folder / "overlays", titles, count=num_images),
    }


def _curves(train_dir: Path, switch: int | None) -> dict[str, Any]:
    """Charts of what is watched, the largest shares of categories last, and words on the others."""
    shares = {path.stem: read_points(path) for path in sorted(train_dir.glob(f"{SHARE}*.tsv"))}
    peaks = {
        name: max((value for _, value in points if math.isfinite(value)), default=0.0)
        for name, points in shares.items()
    }
    largest = sorted(peaks, key=lambda name: -peaks[name])
    shown, others = largest[:MAX_SHARES], largest[MAX_SHARES:]
    paths = {name: train_dir / f"{name}.tsv" for name in WATCHED}
    curves = {name: read_points(path) for name, path in paths.items() if path.is_file()}
    curves |= {name: shares[name] for name in shown}
    charts = [line_chart(name.replace("_", " "), p, mark=switch) for name, p in curves.items()]
    return {
        "curves": [chart for chart in charts if chart["raw"]],
        "num_others": len(others),
        "others_peak": f"{100 * peaks[others[0]]:.1f}" if others else "",
    }


def _switch(params: PlusParams) -> int | None:
    """Step at which the network begins to label for itself, if it does."""
    train = params.train
    is_before_end = train.guided_iterations < train.iterations
    return train.guided_iterations if train.self_training != "off" and is_before_end else None


def _words(params: PlusParams) -> str:
    """`zero_shot on VOC2012, train; network ...`: of local data the names without folders."""
    train, switch = params.train, _switch(params)
    data = "the archives"
    if not isinstance(train.data, str):
        data = Path(str(train.data.root)).name
    if isinstance(train.data, BenchSection) and "split" in train.data.model_fields_set:
        data += f", {train.data.split}"
    length = f"{integer(train.iterations)} iterations"
    if switch:
        length += f", from {integer(switch)} on self-trained"
        length += " until it drifts" if train.self_training == "until_drift" else ""
    parts = [
        f"{train.setting.replace('_', ' ')} on {data}",
        f"network {train.backbone}, {train.head}",
        f"teacher DenseCLIP, {encoder_name(train.encoder)}, {train.teacher}",
        length,
        *([f"unseen: {', '.join(train.unseen)}"] if train.unseen else []),
    ]
    return "; ".join(parts)
