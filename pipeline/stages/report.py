"""Stage 7: everything the other stages left behind, on one self-contained HTML page.

Data -> one dict -> one template: the functions below gather, `report.html.j2` lays out. What a run
has not produced is shown as "not run". Equal inputs give equal bytes.
"""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import numpy as np
from PIL import Image

from pipeline.data.categories import load_category_set
from pipeline.data.images import ImageError, decode_label, decode_png, load_image
from pipeline.data.labels import decode_confidence, training_target
from pipeline.data.shards import MANIFEST, SampleStore, open_samples
from pipeline.data.tables import ArchiveRow, read_archives
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_bytes
from pipeline.params import EncoderParams, Params, read_params
from pipeline.report.charts import line_chart
from pipeline.report.pictures import (
    category_colour,
    fit_image,
    fit_labels,
    paint_labels,
    picture,
)
from pipeline.report.wording import (
    AUDIT_MEASURES,
    BENCH_COLUMNS,
    GLOSSARY,
    ITEM_NAMES,
    STAGES,
)
from pipeline.runtime import StageRun

TEMPLATE_DIR = Path(__file__).resolve().parents[1] / "report"

OPTIONAL_STAGES = ("world",)
# The page's own counts would change it with every run.
STATS_OF_STAGE = {"evaluate": ("evaluate", "audit"), "report": ()}
PACKAGES = ("torch", "open_clip_torch", "faiss-cpu", "webdataset", "dvc", "pillow", "numpy")

AUDIT_PREFIX = "audit_"
THUMBS_PER_ARCHIVE, THUMBS_IN_ALL, MAX_ARCHIVES = 10, 200, 100
NUM_SAMPLES, SPREAD_STEP = 12, 5
OVERLAYS_PER_KIND, OVERLAYS_IN_ALL = 4, 16
THUMB_SIDE, SAMPLE_SIDE, OVERLAY_SIDE = 96, 192, 1200
THUMB_BYTES, SAMPLE_BYTES, OVERLAY_BYTES = 6_000, 12_000, 80_000
LISTED_SKIPS = 200
MAX_CHIPS = 100
NO_VALUE = "\u2013"


def run(
    *,
    archives_path: Path,
    labels_dir: Path,
    live_dir: Path,
    params_path: Path,
    stats_path: Path,
    reports_dir: Path = Path("reports"),
    out_path: Path = Path("reports/index.html"),
) -> None:
    """Write the report page.

    Args:
        archives_path: Parquet table of the archives.
        labels_dir: label shards.
        live_dir: DVCLive's folder of the training run.
        params_path: params file of the run.
        stats_path: where this stage's own counts go.
        reports_dir: folder with `stats/`, `metrics/`, `plots/` and `overlays/`.
        out_path: the HTML file.

    Raises:
        PipelineError: no stage has left anything, or one of its files is damaged.
    """
    with StageRun("report", stats_path=stats_path, unit="section") as stage:
        params = read_params(params_path) if params_path.is_file() else None
        archives = read_archives(archives_path) if archives_path.is_file() else []
        dag = _stages(reports_dir / "stats")
        results: dict[str, Any] = {
            "benches": _benches(reports_dir),
            "audits": _audits(reports_dir / "metrics"),
            "overlays": _overlays(reports_dir / "overlays"),
            "archives": _shard_pictures(labels_dir, archives, params),
            "curves": _curves(live_dir),
        }
        if not (archives or _has_run(dag) or any(results.values())):
            raise PipelineError(
                f"{reports_dir}: nothing to report on, no stage has run yet; run `dvc repro`"
            )
        names = _category_names(archives, params)
        write_bytes(out_path, _render(dag, results, names, params).encode())
        stage.advance(1 + len(results))


def _render(
    dag: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    names: Sequence[str],
    params: Params | None,
) -> str:
    """The page: its sections, what heads them, and the colours of the categories."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        results,
        stages=dag,
        title=_title(dag, names),
        facts=_facts(dag, params),
        names=names,
        colour_of=dict(zip(names, map(category_colour, count(1)), strict=False)),
        columns=BENCH_COLUMNS,
        measures=AUDIT_MEASURES,
        settings=_settings(params),
        glossary=GLOSSARY,
        versions=_versions(),
        max_chips=MAX_CHIPS,
        no_value=NO_VALUE,
    )


# -- numbers ---------------------------------------------------------------------------------------


def _score(percentage: Any) -> str:
    """A percentage with one decimal; a dash where there is none."""
    return f"{percentage:.1f}" if _is_number(percentage) else NO_VALUE


def _integer(value: Any) -> str:
    return f"{int(value):,}" if _is_number(value) else NO_VALUE


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- inputs ----------------------------------------------------------------------------------------


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise PipelineError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _category_names(archives: Sequence[ArchiveRow], params: Params | None) -> list[str]:
    """Names in the order of the label ids from 1."""
    if params is not None:
        return load_category_set(params.categories, background=params.background)
    named = {row.label_id: row.category for row in archives if row.label_id > 0}
    return [named.get(label_id, "?") for label_id in range(1, max(named, default=0) + 1)]


# -- sections --------------------------------------------------------------------------------------


def _stages(stats_dir: Path) -> list[dict[str, Any]]:
    """The DAG in order, each stage with its runs (one per source, benchmark or audit)."""
    runs = {stage: _runs(stats_dir, stage) for stage in STAGES}
    seconds = {stage: sum(run["seconds"] for run in runs[stage]) for stage in STAGES}
    total = sum(seconds.values())
    return [
        {
            "name": stage,
            "purpose": purpose,
            "runs": runs[stage],
            "time": _duration(seconds[stage]),
            "share": f"{100 * seconds[stage] / total:.1f}" if total else "0",
        }
        for stage, purpose in STAGES.items()
        if runs[stage] or stage not in OPTIONAL_STAGES
    ]


def _runs(stats_dir: Path, stage: str) -> list[dict[str, Any]]:
    """Counts of `PREFIX.json`, or of every `PREFIX-NAME.json`, of a stage."""
    runs = []
    for prefix in STATS_OF_STAGE.get(stage, (stage,)):
        kind = "" if prefix == stage else f"{prefix} "
        for path in sorted(stats_dir.glob(f"{prefix}*.json")):
            name = path.stem.removeprefix(prefix)
            if name == "" or name.startswith("-"):
                runs.append(_run(path, kind + name[1:]))
    return runs


def _run(path: Path, name: str) -> dict[str, Any]:
    stats = _read_object(path)
    seconds, skipped = float(stats.get("seconds") or 0.0), stats.get("skipped") or 0
    items = ITEM_NAMES.get(stats.get("stage", ""), "images")
    counts = {
        key.replace("_", " "): _integer(value)
        for key, value in stats.get("counts", {}).items()
        if value or key == "cached"
    }
    return {
        "name": name,
        "seconds": seconds,
        "time": _duration(seconds),
        "num_items": stats.get("items") or 0,
        "facts": {items: _integer(stats.get("items")), "skipped": _integer(skipped), **counts},
        "num_skipped": skipped,
        "skipped_items": stats.get("skipped_items", [])[:LISTED_SKIPS],
        "num_unlisted": max(0, skipped - LISTED_SKIPS),
    }


def _shard_pictures(
    labels_dir: Path, archives: Sequence[ArchiveRow], params: Params | None
) -> dict[str, Any]:
    """Strips of the archives and overlays of a dozen samples; empty before there are shards."""
    if not archives or not (labels_dir / MANIFEST).is_file():
        return {}
    store = open_samples(labels_dir)
    index_of = {key: index for index, key in enumerate(store.keys)}
    found: dict[int, list[tuple[ArchiveRow, int]]] = {}
    for row in archives:
        index = index_of.get(f"{row.key}_{row.label_id}")
        if index is not None:
            found.setdefault(row.label_id, []).append((row, index))
    strips = [_strip(store, rows, len(found)) for rows in list(found.values())[:MAX_ARCHIVES]]
    samples = [_sample(store, row, index, params) for row, index in _spread(found)]
    return {
        "strips": strips,
        "num_hidden": len(found) - len(strips),
        "samples": samples,
        "target": params.train.target if params else "",
        "label_ids": sorted({value for sample in samples for value in sample["label_ids"]}),
    }


def _strip(
    store: SampleStore, rows: Sequence[tuple[ArchiveRow, int]], num_archives: int
) -> dict[str, Any]:
    """The first images of one archive."""
    shown = min(THUMBS_PER_ARCHIVE, max(2, THUMBS_IN_ALL // num_archives))
    thumbs = []
    for row, index in rows[:shown]:
        image = fit_image(load_image(store.member(index, "jpg")), THUMB_SIDE)
        alt = f"{row.category or 'negative'}, rank {row.rank}"
        thumb = picture(image, alt=alt, max_bytes=THUMB_BYTES)
        thumbs.append(thumb | {"similarity": f"{row.similarity:.3f}"})
    first = rows[0][0]
    return {
        "name": first.category if first.label_id else "negatives",
        "size": _integer(len(rows)),
        "thumbs": thumbs,
    }


def _spread(found: Mapping[int, Sequence[tuple[ArchiveRow, int]]]) -> list[tuple[ArchiveRow, int]]:
    """A dozen samples, spread over categories and over ranks from first to last."""
    archives = [rows for label_id, rows in found.items() if label_id > 0]
    total = min(NUM_SAMPLES, sum(len(rows) for rows in archives))
    chosen: dict[tuple[int, int], tuple[ArchiveRow, int]] = {}
    for slot in range(total):
        rows = archives[slot * len(archives) // total % len(archives)]
        place = slot * SPREAD_STEP % total / max(1, total - 1)
        row, index = rows[round(place * (len(rows) - 1))]
        chosen[row.label_id, row.rank] = row, index
    return list(chosen.values())


def _sample(
    store: SampleStore, row: ArchiveRow, index: int, params: Params | None
) -> dict[str, Any]:
    """Image, pseudo-mask, dense labels and training target of one sample, as pictures."""
    image = fit_image(load_image(store.member(index, "jpg")), SAMPLE_SIDE)
    mask = decode_png(store.member(index, "mask.png")) > 127
    dense_labels = decode_label(store.member(index, "label.png"))
    maps = {"pseudo-mask": mask * row.label_id, "DenseCLIP": dense_labels}
    if params is not None:
        maps["training saw"] = training_target(
            mask,
            row.label_id,
            dense_labels,
            decode_confidence(decode_png(store.member(index, "confidence.png"))),
            target=params.train.target,
            confidence_threshold=params.train.confidence_threshold,
            conflict=params.train.conflict,
        )
    pictures = {"image": picture(image, alt=f"Image of {row.category}", max_bytes=SAMPLE_BYTES)}
    for title, labels in maps.items():
        painted = paint_labels(np.asarray(image), fit_labels(labels, image.size))
        alt = f"{title} over the image of {row.category}"
        pictures[title] = picture(Image.fromarray(painted), alt=alt, max_bytes=SAMPLE_BYTES)
    return {
        "name": row.category,
        "rank": row.rank,
        "similarity": f"{row.similarity:.3f}",
        "pictures": pictures,
        "label_ids": {int(value) for labels in maps.values() for value in np.unique(labels)},
    }


def _curves(live_dir: Path) -> list[dict[str, Any]]:
    """A line chart of every curve that DVCLive wrote (TSV with columns step and value)."""
    root = live_dir / "plots" / "metrics"
    charts = []
    for path in sorted(root.rglob("*.tsv"), key=lambda path: ("loss" not in path.stem, path)):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        columns = [name for name in rows[0] if name not in ("step", "timestamp")] if rows else []
        if len(columns) != 1 or "step" not in rows[0]:
            raise PipelineError(f"{path}: expected the columns step and one value; train again")
        points = [(_float(row["step"]), _float(row[columns[0]])) for row in rows]
        charts.append(line_chart(path.relative_to(root).with_suffix("").as_posix(), points))
    return charts


def _benches(reports_dir: Path) -> list[dict[str, Any]]:
    benches = []
    for path in sorted((reports_dir / "metrics").glob("*.json")):
        if path.stem.startswith(AUDIT_PREFIX):
            continue
        metrics = _read_object(path)
        groups = metrics.get("groups") or {}
        benches.append(
            {
                "name": path.stem,
                "headline": _bench_headline(metrics),
                "rows": [_scores(path.stem, metrics)]
                + [_scores(name, group, is_group=True) for name, group in groups.items()],
                "protocol": dict(_flatten(metrics.get("protocol") or {})),
                "per_class": _per_class(reports_dir / "plots" / f"{path.stem}_per_class.csv"),
            }
        )
    return benches


def _bench_headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    miou, baseline = metrics.get("miou"), metrics.get("baseline_miou")
    gain = miou - baseline if _is_number(miou) and _is_number(baseline) else None
    return {
        "miou": _score(miou),
        "ap50": _score(metrics.get("ap50")),
        "baseline": _score(baseline),
        "gain": "" if gain is None else f"{gain:+.1f}",
        "n_images": _integer(metrics.get("n_images")),
    }


def _scores(name: str, metrics: Mapping[str, Any], *, is_group: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "is_group": is_group,
        "n_images": _integer(metrics.get("n_images")),
        "scores": {key: _score(metrics[key]) for key in BENCH_COLUMNS if key in metrics},
    }


def _per_class(path: Path) -> list[dict[str, Any]]:
    """Bars of the classes, best first; those that never occur last."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"category", "iou"} <= rows[0].keys():
        raise PipelineError(f"{path}: expected the columns category, iou, baseline_iou")
    scored = [
        (row["category"], _float(row["iou"]), _float(row.get("baseline_iou"))) for row in rows
    ]
    return [
        {"name": name, "iou": _score(iou), "baseline": _score(baseline)}
        for name, iou, baseline in sorted(
            scored, key=lambda bar: -bar[1] if _is_number(bar[1]) else math.inf
        )
    ]


def _audits(metrics_dir: Path) -> list[dict[str, Any]]:
    """Scores of archives, pseudo-masks and pseudo-labels against true masks of index images."""
    audits = []
    for path in sorted(metrics_dir.glob(f"{AUDIT_PREFIX}*.json")):
        metrics = _read_object(path)
        scores = {key: _score(metrics[key]) for key in AUDIT_MEASURES if key in metrics}
        audits.append({"name": path.stem.removeprefix(AUDIT_PREFIX), "scores": scores})
    return audits


def _overlays(overlays_dir: Path) -> list[dict[str, Any]]:
    """Best and worst predictions of each benchmark."""
    paths = sorted(overlays_dir.glob("*/index.json"))
    shown = min(OVERLAYS_PER_KIND, max(1, OVERLAYS_IN_ALL // (2 * max(1, len(paths)))))
    return [
        {
            "name": path.parent.name,
            "kinds": {
                kind: [_overlay(path.parent, entry) for entry in _of_kind(path, kind)[:shown]]
                for kind in ("best", "worst")
            },
        }
        for path in paths
    ]


def _of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    entries = read_json(path)
    try:
        return [entry for entry in entries if entry["kind"] == kind]
    except (KeyError, TypeError):
        raise PipelineError(
            f"{path}: expected a list of objects with file, image_id, miou and kind; "
            "run `pipeline evaluate` again"
        ) from None


def _overlay(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    try:
        image = fit_image(load_image(folder / entry["file"]), OVERLAY_SIDE)
    except ImageError as error:
        raise PipelineError(
            f"{folder / entry['file']}: {error}; run `pipeline evaluate` again"
        ) from None
    alt = f"Prediction on image {entry['image_id']}"
    shown = picture(image, alt=alt, max_bytes=OVERLAY_BYTES)
    return shown | {"image_id": entry["image_id"], "miou": _score(entry.get("miou"))}


def _has_run(dag: Sequence[Mapping[str, Any]]) -> bool:
    return any(stage["runs"] for stage in dag)


def _index_size(dag: Sequence[Mapping[str, Any]]) -> str:
    """Number of embedded images; empty before `embed` has run."""
    runs = next(stage["runs"] for stage in dag if stage["name"] == "embed")
    return _integer(sum(run["num_items"] for run in runs)) if runs else ""


def _title(dag: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    noun = "category" if len(names) == 1 else "categories"
    size = _index_size(dag)
    return f"{len(names):,} {noun} from {size + ' ' if size else ''}unlabelled images"


def _facts(dag: Sequence[Mapping[str, Any]], params: Params | None) -> dict[str, str]:
    facts = {}
    if size := _index_size(dag):
        facts["images in the index"] = size
    if params:
        facts["images per archive, k"] = _integer(params.k)
        facts["training iterations"] = _integer(params.train.iterations)
    if _has_run(dag):
        facts["time of all stages"] = _duration(
            sum(run["seconds"] for stage in dag for run in stage["runs"])
        )
    return facts


def _settings(params: Params | None) -> dict[str, str]:
    """The params that a reader needs to judge the numbers."""
    if params is None:
        return {}
    train = params.train
    return {
        "images per archive (k)": _integer(params.k),
        "index encoder": _encoder(params.embed.encoder),
        "overlap of archives": params.retrieve.overlap,
        "pseudo-masks": params.mask.source,
        "dense encoder": _encoder(params.pseudo_label.encoder),
        "trained encoder": _encoder(train.encoder),
        "iterations": _integer(train.iterations),
        "batch size": _integer(train.batch_size),
        "training target": train.target,
        "seed": str(params.seed),
    }


def _encoder(encoder: EncoderParams) -> str:
    """`ViT-B-16-quickgelu / openai`; of local files the names without folders."""
    return f"{Path(encoder.model).name} / {Path(encoder.pretrained).name}"


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested objects, their keys joined by dots."""
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves += _flatten(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _float(text: str | None) -> float:
    """A table's number; NaN where the cell is empty or not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
