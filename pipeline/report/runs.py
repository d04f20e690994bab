"""What the stages did: counts and skipped items, from their stats files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import counted, listing
from pipeline.report.inputs import integer, is_wanted, read_object
from pipeline.report.wording import ITEM_NAMES, STAGES

OPTIONAL_STAGES = ("world", "bank", "relabel", "retrain")
# The page's own counts would change it with every run.
STATS_OF_STAGE = {"score": ("score", "audit"), "report": ()}
LISTED_SKIPS = 200


def read_stages(
    stats_dir: Path, names: Mapping[str, Collection[str]] | None = None
) -> list[dict[str, Any]]:
    """The DAG in order, each stage with its runs (one per world, source, benchmark or audit).

    Args:
        stats_dir: folder of `PREFIX.json` or `PREFIX-NAME.json` files.
        names: the runs to show of a prefix; of a prefix that is not there, all of them.

    Raises:
        PipelineError: a stats file is damaged.
    """
    runs = {stage: _runs(stats_dir, stage, names or {}) for stage in STAGES}
    return [
        {
            "name": stage,
            "purpose": purpose,
            "runs": runs[stage],
        }
        for stage, purpose in STAGES.items()
        if runs[stage] or stage not in OPTIONAL_STAGES
    ]


def has_run(stages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any stage has left its counts."""
    return any(stage["runs"] for stage in stages)


def index_size(stages: Sequence[Mapping[str, Any]]) -> str:
    """Number of embedded images; empty before `embed` has run."""
    runs = next(stage["runs"] for stage in stages if stage["name"] == "embed")
    return integer(sum(run["num_items"] for run in runs)) if runs else ""


def _runs(
    stats_dir: Path, stage: str, names: Mapping[str, Collection[str]]
) -> list[dict[str, Any]]:
    runs = []
    for prefix in STATS_OF_STAGE.get(stage, (stage,)):
        kind = "" if prefix == stage else f"{prefix} "
        for path in sorted(stats_dir.glob(f"{prefix}*.json")):
            name = path.stem.removeprefix(prefix)
            is_of_stage = name == "" or name.startswith("-")
            if is_of_stage and is_wanted(name[1:], names.get(prefix)):
                runs.append(_run(path, kind + name[1:]))
    return runs


def _run(path: Path, name: str) -> dict[str, Any]:
    stats = read_object(path)
    skipped = stats.get("skipped") or 0
    items = ITEM_NAMES.get(stats.get("stage", ""), "images")
    counts = {
        key.replace("_", " "): integer(value)
        for key, value in stats.get("counts", {}).items()
        if value or key == "cached"
    }
    if stats.get("left_out"):
        counts["left out"] = counted(stats["left_out"])
    if stats.get("never_predicted"):
        counts["never predicted"] = listing(stats["never_predicted"])
    return {
        "name": name,
        "num_items": stats.get("items") or 0,
        "facts": {items: integer(stats.get("items")), "skipped": integer(skipped), **counts},
        "warnings": stats.get("warnings", []),
        "num_skipped": skipped,
        "skipped_items": stats.get("skipped_items", [])[:LISTED_SKIPS],
        "num_unlisted": max(0, skipped - LISTED_SKIPS),
    }
