"""Scores on benchmarks, by class and group, and of audits."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.pictures.confusion import draw_confusion
from tests.report.helpers import CATEGORIES, Tree, checked, section, text_of


def test_scores_of_bench_groups_and_audit(page: str) -> None:
    scores = section(page, "scores")
    text = text_of(scores)
    assert "voc 47.5 12.3 86.1 20.3 36.5 \u2013 25.0 44.0 22.0 60" in text
    assert "known 50.0" in text
    assert "unseen 44.4" in text
    for measure in ("89.1", "70.2", "56.0", "14.0", "58.0"):
        assert f"<td>{measure}</td>" in scores
    assert "threshold 0.5 resize to none" in text


def test_scores_have_the_columns_that_some_benchmark_has(tree: Tree) -> None:
    scores = {"miou_seen": 40.0, "miou_unseen": 20.0, "hiou": 26.67, "n_images": 9}
    write_json(tree.reports_dir / "metrics/zoo.json", scores | {"protocol": []})
    tree.params_path.unlink()
    page = tree.report()
    table = section(page, "scores").split("<table>")[1].split("</table>")[0]
    assert re.findall(r'<th scope="col">(.*?)</th>', table)[:6] == [
        *("Benchmark", "mIoU", "Baseline mIoU", "Seen mIoU", "Unseen mIoU", "hIoU")
    ]
    assert "mIoU MS" not in table
    assert "hIoU is the harmonic mean" in page
    assert "mIoU S, MS" not in page
    assert "zoo \u2013 \u2013 40.0 20.0 26.7 \u2013" in text_of(table)


def test_class_bars_are_sorted_and_carry_the_baseline(page: str) -> None:
    bars = section(page, "scores").split('<ul class="bars">')[1].split("</ul>")[0]
    assert re.findall(r">([\d.\u2013]+)</b>", bars) == ["77.8", "66.7", "33.3", "\u2013"]
    assert 'width="77.8%"' in bars
    assert 'x1="31.2%"' in bars
    last = bars.split("<li>")[-1]
    assert "fill" not in last
    assert "mark" not in last


def write_confusion(tree: Tree, counts: list[list[int]]) -> None:
    names = ["background", *CATEGORIES]
    path = tree.reports_dir / "plots/voc_confusion.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["category", *names])
        writer.writerows([name, *row] for name, row in zip(names, counts, strict=True))
    draw_confusion(np.array(counts), names).save(path.with_suffix(".png"))


def test_the_confusion_matrix_is_shown_with_its_pairs(tree: Tree) -> None:
    counts = np.diag([90, 5, 5, 5])
    counts[0, 2] = 10
    write_confusion(tree, counts.tolist())
    page = tree.report()
    found = checked(page)
    (shown,) = (image for image in found.images if "Confusion" in (image["alt"] or ""))
    assert shown["alt"] == f"Confusion matrix. background taken for {CATEGORIES[1]}: 10.0 %"
    write_confusion(tree, np.zeros((4, 4), int).tolist())  # no label maps were scored
    assert "Confusion" not in tree.report()
    write_confusion(tree, counts.tolist())
    table = tree.reports_dir / "plots/voc_confusion.csv"
    for damage in ("", "category,cat\ncat,x\n", "category,cat\ncat,1,2\n"):
        table.write_text(damage)
        with pytest.raises(PipelineError, match=r"voc_confusion\.png: .*`pipeline score` again"):
            tree.report()


def test_accuracies_of_seen_and_unseen_have_columns(tree: Tree) -> None:
    scores = {"mean_acc": 50.0, "pixel_acc_unseen": 33.3, "mean_acc_seen": 44.4, "n_images": 9}
    write_json(tree.reports_dir / "metrics/voc.json", scores | {"protocol": []})
    table = section(tree.report(), "scores").split("<table>")[1].split("</table>")[0]
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == [
        *("Benchmark", "Unseen pixel acc.", "Mean acc.", "Seen mean acc.", "Images")
    ]


def test_metrics_of_no_benchmark_are_not_shown_as_one(tree: Tree) -> None:
    tree.params_path.unlink()
    page = tree.report()
    write_json(tree.reports_dir / "metrics/plus.json", {"free": {"teacher": {"miou": 9.0}}})
    write_json(tree.reports_dir / "metrics/network.json", {"images_per_second": 9.0})
    assert tree.report() == page
