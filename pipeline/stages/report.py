"""Stage 7: everything the other stages left behind, on one self-contained HTML page.

Data -> one dict -> one template: `pipeline/report/` gathers, `report.html.j2` lays out. What
params.yaml does not name is left out, what a run has not produced is shown as "not run". Equal
inputs give equal bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from pipeline.engine.dry_run import DryRun
from pipeline.engine.progress import StageRun
from pipeline.errors import PipelineError, listing
from pipeline.files import write_bytes
from pipeline.formats.tables import ArchiveRow, read_archives
from pipeline.params.reading import read_params
from pipeline.params.sections import Params
from pipeline.pictures.report import category_colour
from pipeline.report.ablations import read_ablations
from pipeline.report.curves import read_curves
from pipeline.report.inputs import NO_VALUE, encoder_name, integer
from pipeline.report.plus import read_plus
from pipeline.report.predictions import read_best_and_worst, read_typical
from pipeline.report.published import read_published
from pipeline.report.purity import PURITY_COLUMNS, read_purity
from pipeline.report.runs import has_run, index_size, read_stages
from pipeline.report.samples import TargetMaker, read_samples
from pipeline.report.scores import bench_columns, read_audits, read_benches
from pipeline.report.wording import AUDIT_MEASURES, GLOSSARY, GLOSSARY_OF_SCORES
from pipeline.training.targets import training_target
from pipeline.vocabulary.categories import load_category_set

TEMPLATE_DIR = Path(__file__).resolve().parents[1] / "report"
PACKAGES = ("torch", "open_clip_torch", "faiss-cpu", "webdataset", "dvc", "pillow", "numpy")
MAX_CHIPS = 100


def run(
    *,
    archives_path: Path,
    masks_dir: Path,
    labels_dir: Path,
    live_dir: Path,
    params_path: Path,
    stats_path: Path,
    reports_dir: Path = Path("reports"),
    out_path: Path = Path("reports/index.html"),
    dry: DryRun | None = None,
) -> None:
    """Write the report page.

    Of worlds, sources, benchmarks, audits and DenseCLIP+ it shows those that the params file names,
    and all of them where there is no params file. Scores on a benchmark for development are left to
    the ablations.

    Args:
        archives_path: Parquet table of the archives.
        masks_dir: mask shards.
        labels_dir: label shards.
        live_dir: DVCLive's folder of the training run.
        params_path: params file of the run.
        stats_path: where this stage's own counts go.
        reports_dir: folder with `stats/`, `metrics/`, `plots/`, `overlays/` and, if they are to be
            shown, `plus/`, `published.yaml` and `ablations/`.
        out_path: the HTML file.
        dry: is told what would be shown, and nothing is written.

    Raises:
        PipelineError: no stage has left anything, or one of its files is damaged.
    """
    gather = partial(_gather, archives_path, masks_dir, labels_dir, live_dir, params_path)
    if dry is not None:
        results = gather(reports_dir).results
        empty = [name for name, found in results.items() if not found]
        dry.items(
            1 + len(results), unit="sections", text=f"; not run: {listing(empty)}" if empty else ""
        )
        return
    with StageRun("report", stats_path=stats_path, unit="section") as stage:
        page = gather(reports_dir)
        write_bytes(out_path, _render(*page).encode())
        stage.advance(1 + len(page.results))


class _Page(NamedTuple):
    """What is shown: the stages, what they left by section, names by label id, and the params."""

    stages: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    categories: Sequence[str]
    params: Params | None


def _gather(
    archives_path: Path,
    masks_dir: Path,
    labels_dir: Path,
    live_dir: Path,
    params_path: Path,
    reports_dir: Path,
) -> _Page:
    """Read all that the page shows.

    Raises:
        PipelineError: see `run`.
    """
    params = read_params(params_path) if params_path.is_file() else None
    archives = read_archives(archives_path) if archives_path.is_file() else []
    names = _names_by_prefix(params)
    benches, metrics_dir = _reported(params), reports_dir / "metrics"
    stages = read_stages(reports_dir / "stats", names)
    results: dict[str, Any] = {
        "typical": read_typical(reports_dir / "overlays", benches),
        "overlays": read_best_and_worst(reports_dir / "overlays", benches),
        "benches": read_benches(metrics_dir, reports_dir / "plots", benches),
        "audits": read_audits(metrics_dir, names.get("audit")),
        "archives": read_samples(masks_dir, labels_dir, archives, _target_maker(params)),
        "curves": read_curves(live_dir),
        "plus": read_plus(reports_dir / "plus", params.plus if params else None),
    }
    if not (archives or has_run(stages) or any(results.values())):
        raise PipelineError(
            f"{reports_dir}: nothing to report on, no stage has run yet; run `dvc repro`"
        )
    published = read_published(reports_dir / "published.yaml", metrics_dir)
    results["published"] = list(published.values())
    results["ablations"] = read_ablations(reports_dir / "ablations", published, names.get("score"))
    categories = _category_names(archives, params)
    results["purity"] = read_purity(reports_dir / "stats", categories)
    return _Page(stages, results, categories, params)


def _render(
    stages: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    categories: Sequence[str],
    params: Params | None,
) -> str:
    """The page: its sections, what heads them, and the colours of the categories."""
    columns = bench_columns(results["benches"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_DIR),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        results,
        stages=stages,
        title=_title(stages, categories),
        facts=_facts(stages, params),
        names=categories,
        colour_of=dict(zip(categories, map(category_colour, count(1)), strict=False)),
        target=params.train.targets.target if params else "",
        columns=columns,
        measures=AUDIT_MEASURES,
        purity_columns=PURITY_COLUMNS,
        settings=_settings(params),
        plus_not_run=_plus_not_run(results["plus"], params),
        glossary=_glossary(bench_columns([*results["benches"], *results["plus"]])),
        versions=_versions(),
        max_chips=MAX_CHIPS,
        no_value=NO_VALUE,
    )


def _names_by_prefix(params: Params | None) -> dict[str, frozenset[str]]:
    """Entries of params.yaml's tables, by the first word of the stats files that they give."""
    if params is None:
        return {}
    return {
        "world": frozenset(params.worlds),
        "embed": frozenset(params.index),
        "relabel": frozenset(params.rounds),
        "retrain": frozenset(params.rounds),
        "predict_bench": frozenset(params.benches),
        "score": frozenset(params.benches),
        "audit": frozenset(params.audits),
        **({} if params.bank else {"bank": frozenset()}),  # the run of no name is no more shown
    }


def _reported(params: Params | None) -> frozenset[str] | None:
    """Benchmarks whose scores are shown; all without a params file."""
    if params is None:
        return None
    return frozenset(name for name, bench in params.benches.items() if not bench.development)


def _target_maker(params: Params | None) -> TargetMaker | None:
    if params is None:
        return None
    targets = params.train.targets
    return partial(
        training_target,
        target=targets.target,
        confidence_threshold=targets.confidence_threshold,
        conflict=targets.conflict,
    )


def _category_names(archives: Sequence[ArchiveRow], params: Params | None) -> list[str]:
    """Names in the order of the label ids from 1."""
    if params is not None:
        return load_category_set(params.category_names, background=params.background)
    named = {row.label_id: row.category for row in archives if row.label_id > 0}
    return [named.get(label_id, "?") for label_id in range(1, max(named, default=0) + 1)]


def _title(stages: Sequence[Mapping[str, Any]], categories: Sequence[str]) -> str:
    noun = "category" if len(categories) == 1 else "categories"
    size = index_size(stages)
    return f"{len(categories):,} {noun} from {size + ' ' if size else ''}unlabelled images"


def _facts(stages: Sequence[Mapping[str, Any]], params: Params | None) -> dict[str, str]:
    facts = {}
    if size := index_size(stages):
        facts["images in the index"] = size
    if params:
        facts["images per archive, k"] = integer(params.k)
        facts["training iterations"] = integer(params.train.iterations)
    return facts


def _settings(params: Params | None) -> dict[str, str]:
    """The params that a reader needs to judge the numbers."""
    if params is None:
        return {}
    train, bank = params.train, params.bank
    return {
        "images per archive (k)": integer(params.k),
        "index encoder": encoder_name(params.embed.encoder),
        "overlap of archives": params.retrieve.overlap,
        "pseudo-masks": params.mask.source,
        "dense encoder": encoder_name(params.pseudo_label.encoder),
        **({"region bank, weight in labels": f"{bank.weight:g}"} if bank else {}),
        "trained encoder": encoder_name(train.encoder),
        "iterations": integer(train.iterations),
        "batch size": integer(train.batch_size),
        "training target": train.targets.target,
        "seed": str(params.seed),
    }


def _plus_not_run(shown: Sequence[Mapping[str, Any]], params: Params | None) -> list[str]:
    """Entries of `plus` that have left nothing yet."""
    return (
        [name for name in params.plus if all(name != it["name"] for it in shown)] if params else []
    )


def _glossary(columns: Collection[str]) -> dict[str, str]:
    """Terms and meanings; those of rare scores only where there are such scores."""
    rare = [terms for key, terms in GLOSSARY_OF_SCORES.items() if key in columns]
    return dict(chain(GLOSSARY.items(), *(terms.items() for terms in rare)))


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
