"""Ablations beside the papers' tables."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.ablations.definitions import list_ablations, read_ablation
from pipeline.ablations.results import AblationResult, RunResult, VariantResult, write_result
from pipeline.ablations.summary import summarised
from pipeline.errors import PipelineError
from pipeline.files import write_json
from tests.report.helpers import PUBLISHED, Tree, checked, section, text_of, write_published


def test_ablations_that_have_run_stand_beside_the_paper(tree: Tree) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    variants = [
        {"label": "without <b>", "params": {"train.max_paste": 1, "train.flip": None}},
        {"label": "with", "params": {}},
    ]
    run_one = {"experiment": "x", "encoder": "tiny/tiny", "metrics": {"miou": 11.16, "ap": None}}
    write_json(
        tree.reports_dir / "ablations/copy_paste.json",
        {
            "ablation": "copy_paste",
            "bench": "voc",
            "params": {"train.stop_gradient": True},
            "variants": [variants[0] | run_one, variants[1]],
        },
    )
    page = tree.report()
    checked(page)
    shown = section(page, "ablations")
    first, *others = re.split(r"<details>", shown)
    text = text_of(first)
    assert (
        "without &lt;b&gt; train.max_paste: 1, train.flip: null 11.2 \u2013 \u2013 \u2013" in text
    )
    assert "with as in params.yaml not run" in text
    assert "voc, tiny/tiny, all with train.stop_gradient: true" in text
    assert "ZUTIS, Table 8" in text
    assert "with copy-paste 63.7 30.9" in text
    assert " ".join(read_ablation("copy_paste").carries_over.split()[:6]) in text
    assert len(others) == len(list_ablations()) - 1
    assert all("not run: <code>pipeline ablate" in other for other in others)


def run_of(seed: int, miou: float, seconds: float | None) -> dict[str, Any]:
    metrics = {"voc": {"miou": miou, "ap50": None}}
    stages = {"train": {"key": f"{seed}-{miou}", "seconds": seconds}}
    return {"seed": seed, "experiment": "x", "metrics": metrics, "stages": stages}


def test_seeds_lifts_and_seconds_are_shown(tree: Tree) -> None:
    ablation = read_ablation("rounds")
    runs = {
        "plain": [run_of(0, 50.0, None), run_of(1, 52.0, 100.0)],
        "longer": [run_of(0, 51.0, 200.0), run_of(1, 55.0, 210.0)],
    }
    variants = [
        summarised(
            VariantResult(label=label, params={}),
            [RunResult.model_validate(entry) for entry in found],
            benches=["voc"],
            base=None,
        )
        for label, found in runs.items()
    ]
    base = variants[0].runs
    variants = [
        summarised(variant, variant.runs, benches=["voc"], base=base)
        for variant in (variants[0].model_copy(update={"runs": base}), variants[1])
    ]
    result = AblationResult(ablation="rounds", bench="voc", params={}, variants=variants)
    write_result(tree.reports_dir / "ablations/rounds.json", result)
    page = tree.report()
    checked(page)
    text = text_of(section(page, "ablations").split("<details>")[0])
    assert "Variant mIoU AP50 mIoU, lift AP50, lift seconds more" in text
    assert "longer as in params.yaml 53.0 (51.0 to 55.0) \u2013 +2.0 (+1.0 to +3.0)" in text
    assert "\u2013 205 +110" in text
    assert "Mean of 2 seeds" in text
    assert f"over {ablation.lift_over}" in text.replace("<q>", "").replace("</q>", "")


def test_ablations_are_listed_as_not_run_without_results_and_tables(page: str) -> None:
    shown = section(page, "ablations")
    for name in list_ablations():
        assert f"<code>pipeline ablate {name}</code>" in shown
    assert "ZUTIS, Table" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", r"k\.json: key 'bench' is missing"),
        ("{", r"k\.json: not valid JSON"),
    ],
)
def test_damaged_results_of_an_ablation_are_named(tree: Tree, content: str, message: str) -> None:
    path = tree.reports_dir / "ablations/k.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(PipelineError, match=message):
        tree.report()
