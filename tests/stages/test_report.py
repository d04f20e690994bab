"""The report page: complete, self-contained, escaped, deterministic, and content with less."""

from __future__ import annotations

import csv
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from dvclive import Live
from PIL import Image
from ruamel.yaml import YAML

from pipeline.ablations.definitions import list_ablations, read_ablation
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.formats.images import encode_jpeg, encode_label, encode_png
from pipeline.formats.shards import write_shards
from pipeline.formats.tables import ArchiveRow, read_archives, write_archives
from pipeline.params.reading import read_section
from pipeline.pictures.report import (
    category_colour,
    enlarge_image,
    fit_image,
    fit_labels,
    paint_labels,
    picture,
)
from pipeline.report.charts import line_chart, nice_ticks
from pipeline.report.published import Published, read_published
from pipeline.stages.report import run
from tests.paths import ROOT

CATEGORIES = ["cat", 'dog & <b>"pup"</b>', "bird"]
EVIL = "<script>alert('x')</script>"
MAX_PAGE_BYTES = 5_000_000
VOID_TAGS = {"img", "meta", "link", "rect", "line", "polyline"}


@dataclass(frozen=True)
class Tree:
    """Folders of a project, as the other stages leave them."""

    root: Path

    @property
    def reports_dir(self) -> Path:
        return self.root / "reports"

    @property
    def labels_dir(self) -> Path:
        return self.root / "data/labels"

    @property
    def archives_path(self) -> Path:
        return self.root / "data/archives.parquet"

    @property
    def live_dir(self) -> Path:
        return self.reports_dir / "live"

    @property
    def params_path(self) -> Path:
        return self.root / "params.yaml"

    @property
    def out_path(self) -> Path:
        return self.reports_dir / "index.html"

    def report(self) -> str:
        """Run the stage and read its page."""
        run(
            reports_dir=self.reports_dir,
            archives_path=self.archives_path,
            masks_dir=self.labels_dir,
            labels_dir=self.labels_dir,
            live_dir=self.live_dir,
            params_path=self.params_path,
            out_path=self.out_path,
            stats_path=self.reports_dir / "stats" / "report.json",
        )
        return self.out_path.read_text(encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Output of every stage for three categories with four images each, and two negatives."""
    tree = Tree(tmp_path)
    write_archive_shards(tree, CATEGORIES, per_category=4, num_negatives=2, size=(20, 30))
    write_stats(tree)
    write_scores(tree)
    write_overlays(tree)
    write_curves(tree)
    names = "".join(f"  - '{name}'\n" for name in CATEGORIES)
    tree.params_path.write_text(
        f"k: 4\nseed: 7\ncategories:\n{names}"
        "index: {photos: {root: photos}, tars: {root: tars, format: webdataset}}\n"
        "train: {iterations: 1234, target: fused}\n"
        "worlds: {demo: {}}\n"
        "benches: {voc: {format: voc, root: voc, split: val, categories: voc}}\n"
        "audits: {photos: {root: truth, categories: voc}}\n"
    )
    return tree


@pytest.fixture
def page(tree: Tree) -> str:
    return tree.report()


def write_archive_shards(
    tree: Tree,
    categories: list[str],
    *,
    per_category: int,
    size: tuple[int, int],
    num_negatives: int = 0,
) -> None:
    rng = np.random.default_rng(0)
    archives = {0: ("", num_negatives)} if num_negatives else {}
    archives |= {i: (name, per_category) for i, name in enumerate(categories, start=1)}
    rows, samples = [], []
    for label_id, (category, count) in archives.items():
        for rank in range(1, count + 1):
            key, similarity = f"{label_id:010x}{rank:010x}", 0.5 - rank / 1000
            source = ("photos", f"{key}.jpg", None, None, size[1], size[0], "0" * 64)
            rows.append(ArchiveRow(category, label_id, rank, key, similarity, *source))
            mask = np.zeros(size, dtype=bool)
            mask[size[0] // 4 : size[0] // 2] = label_id > 0
            labels = rng.integers(-1, len(categories) + 1, size)
            samples.append(
                {
                    "__key__": f"{key}_{label_id}",
                    "jpg": encode_jpeg(
                        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
                    ),
                    "mask.png": encode_png(mask),
                    "label.png": encode_label(labels, len(categories)),
                    "confidence.png": encode_png(rng.integers(0, 256, size, dtype=np.uint8)),
                    "json": {"category": category, "label_id": label_id, "rank": rank},
                }
            )
    write_archives(tree.archives_path, rows)
    write_shards(samples, tree.labels_dir, shard_size=5)


def write_stats(tree: Tree) -> None:
    def write(file_name: str, items: int, seconds: float, **counts: int) -> None:
        stage = re.split(r"[-.]", file_name)[0]
        write_json(
            tree.reports_dir / "stats" / file_name,
            {
                "stage": stage,
                "items": items,
                "skipped": 0,
                "seconds": seconds,
                "items_per_second": items / seconds,
                "counts": counts,
                "skipped_items": [],
            },
        )

    write("embed-photos.json", 1500, 12.5, cached=40)
    write("retrieve.json", 1500, 1.0, overlaps=3)
    write("mask.json", 14, 4.0, cached=0, empty_masks=0)
    write("pseudo_label.json", 14, 2.0)
    write("train.json", 1234, 3725.0)
    write("predict_bench-voc.json", 60, 10.0)
    write("score-voc.json", 60, 10.0)
    write("audit-photos.json", 28, 0.5)
    write_json(
        tree.reports_dir / "stats" / "embed-tars.json",
        {
            "stage": "embed",
            "items": 500,
            "skipped": 2,
            "seconds": 5.0,
            "items_per_second": 100.0,
            "counts": {},
            "skipped_items": [
                {"item": "00000.tar:a.jpg", "reason": "truncated"},
                {"item": f"{EVIL}.jpg", "reason": "not an image"},
            ],
        },
    )


def write_scores(tree: Tree) -> None:
    scores = {
        "miou": 47.51,
        "pixel_acc": 86.12,
        "ap": 20.31,
        "ap50": 36.52,
        "ap75": None,
        "ap_agnostic": 25.0,
        "ap50_agnostic": 44.0,
        "ap75_agnostic": 22.0,
        "baseline_miou": 12.34,
        "n_images": 60,
    }
    groups = {"known": scores | {"miou": 49.99}, "unseen": scores | {"miou": 44.44}}
    protocol = ["threshold: 0.5", "resize_to: none", f"split: {EVIL}"]
    metrics_dir = tree.reports_dir / "metrics"
    write_json(metrics_dir / "voc.json", scores | {"groups": groups, "protocol": protocol})
    write_json(
        metrics_dir / "audit_photos.json",
        {
            "archive_precision": 89.13,
            "mask_iou": 70.22,
            "label_miou_saliency": 56.04,
            "label_miou_denseclip": 14.03,
            "label_miou_fused": 58.05,
            "n_masks": 12,
        },
    )
    plots_dir = tree.reports_dir / "plots"
    plots_dir.mkdir(parents=True)
    with (plots_dir / "voc_per_class.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["category", "iou", "baseline_iou"])
        writer.writerow(["background", 33.31, 20.0])
        writer.writerow([CATEGORIES[0], "", ""])
        writer.writerow([CATEGORIES[1], 66.67, 0.0])
        writer.writerow([CATEGORIES[2], 77.78, 31.25])


def write_overlays(tree: Tree) -> None:
    overlays_dir = tree.reports_dir / "overlays/voc"
    overlays_dir.mkdir(parents=True)
    index = []
    for number, kind in enumerate(("best", "best", "worst", "spread")):
        Image.new("RGB", (582, 600), (40 * number, 90, 90)).save(overlays_dir / f"{number}.png")
        entry = {"file": f"{number}.png", "image_id": f"image-{kind}-{number}", "miou": 90.5}
        index.append(entry | {"kind": kind})
    index[2] |= {"image_id": EVIL, "miou": None}
    write_json(overlays_dir / "index.json", index)


def write_curves(tree: Tree) -> None:
    with Live(str(tree.live_dir), save_dvc_exp=False, dvcyaml=None, report=None) as live:
        for step in range(10, 60, 10):
            live.step = step
            live.log_metric("train/loss", 100 / step)
            live.log_metric("train/learning_rate", 1e-5 * (60 - step))


class Checker(HTMLParser):
    """Collects what a page refers to, and complains about tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.counts: dict[str, int] = {}
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: set[str | None] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        self.ids.add(dict(attrs).get("id"))
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A drawn SVG shape: nothing to close, nothing it may refer to."""
        assert tag in VOID_TAGS
        assert not {"href", "src"} & dict(attrs).keys()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open_tags == []
    return checker


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>")[0]


def text_of(fragment: str) -> str:
    """Text without tags, blanks collapsed."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", fragment))


# -- the whole page --------------------------------------------------------------------------------


def test_page_is_well_formed_and_self_contained(page: str) -> None:
    checker = checked(page)
    assert len(page.encode()) < MAX_PAGE_BYTES
    assert "script" not in checker.counts
    for reference in checker.references:
        assert reference.startswith("data:") or reference[1:] in checker.ids
    assert not re.search(r"url\(|@import|https?://", page)
    assert checker.images
    assert all(image["alt"] for image in checker.images)
    assert "not run" not in page.split('<section id="ablations">')[0]


def test_headline_names_categories_index_and_scores_beside_the_baseline(page: str) -> None:
    header = text_of(page.split("<header>")[1].split("</header>")[0])
    assert "3 categories from 2,000 unlabelled images" in header
    assert "cat" in header
    assert "dog &amp; &lt;b&gt;" in header
    assert "bird" in header
    for score in ("47.5", "36.5", "12.3", "+35.2"):
        assert score in header


def test_values_are_escaped(page: str) -> None:
    assert EVIL not in page
    assert CATEGORIES[1] not in page
    assert "dog &amp; &lt;b&gt;&#34;pup&#34;&lt;/b&gt;" in page
    for name in ("pipeline", "scores", "predictions"):
        assert "&lt;script&gt;" in section(page, name)


def test_equal_inputs_give_equal_bytes_even_after_a_first_run(tree: Tree) -> None:
    first = tree.report()
    assert (tree.reports_dir / "stats" / "report.json").is_file()
    assert tree.report() == first


@pytest.mark.parametrize(
    ("missing", "section_name"),
    [
        ("reports/stats", "pipeline"),
        ("reports/metrics", "scores"),
        ("reports/metrics/audit_photos.json", "scores"),
        ("reports/overlays", "predictions"),
        ("data/labels", "archives"),
        ("data/labels", "labels"),
        ("data/archives.parquet", "archives"),
        ("reports/live", "training"),
    ],
)
def test_what_is_missing_is_shown_as_not_run(tree: Tree, missing: str, section_name: str) -> None:
    path = tree.root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = tree.report()
    checked(page)
    assert "not run" in section(page, section_name)


def test_page_without_params_and_plots(tree: Tree) -> None:
    tree.params_path.unlink()
    shutil.rmtree(tree.reports_dir / "plots")
    page = tree.report()
    assert "3 categories" in page
    assert "No params file was found" in page
    assert "training saw" not in page


@pytest.fixture
def leftovers(tree: Tree) -> Tree:
    """The tree, and in it what a preset with other worlds, sources, benches and audits left."""
    reports_dir = tree.reports_dir
    for prefix in ("world", "embed", "score", "audit"):
        stats = {"items": 999_000, "seconds": 9e6, "skipped": 1, "skipped_items": []}
        write_json(reports_dir / f"stats/{prefix}-old.json", {"stage": prefix} | stats)
    metrics = {"miou": 99.91, "baseline_miou": 99.92, "groups": {}, "n_images": 1}
    write_json(reports_dir / "metrics/old.json", metrics)
    write_json(reports_dir / "metrics/audit_old.json", {"mask_iou": 99.93})
    shutil.copytree(reports_dir / "overlays/voc", reports_dir / "overlays/old")
    (reports_dir / "plots/old_per_class.csv").write_text("category,iou\nold class,1\n")
    return tree


def test_what_the_params_do_not_name_is_not_shown(leftovers: Tree) -> None:
    page = leftovers.report()
    for name in ("old.json", "audit_old.json"):
        (leftovers.reports_dir / "metrics" / name).unlink()
    for path in leftovers.reports_dir.glob("stats/*-old.json"):
        path.unlink()
    shutil.rmtree(leftovers.reports_dir / "overlays/old")
    (leftovers.reports_dir / "plots/old_per_class.csv").unlink()
    assert leftovers.report() == page


def test_what_the_params_do_not_name_may_be_damaged(leftovers: Tree) -> None:
    reports_dir = leftovers.reports_dir
    page = leftovers.report()
    for path in [*reports_dir.glob("*/*old.json"), reports_dir / "overlays/old/index.json"]:
        path.write_text("{")
    assert leftovers.report() == page


def test_without_params_everything_is_shown(leftovers: Tree) -> None:
    leftovers.params_path.unlink()
    page = leftovers.report()
    checked(page)
    assert page.count("999,000") == 4
    assert "1,001,000 unlabelled images" in page
    for score in ("99.9", "old class", '<th scope="col">old</th>'):
        assert score in section(page, "scores")
    assert "Best, old" in section(page, "predictions")


def test_params_that_name_no_bench_show_none(tree: Tree) -> None:
    lines = tree.params_path.read_text().splitlines()
    tree.params_path.write_text("\n".join(line for line in lines if "benches" not in line))
    page = tree.report()
    assert "Benchmarks: not run" in section(page, "scores")
    assert "Overlays of predictions: not run" in section(page, "predictions")
    assert "47.5" not in page
    assert "image-" not in page


def test_stats_alone_make_a_page(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    write_stats(tree)
    assert "0 categories" in tree.report()


def test_nothing_at_all_is_an_error_and_leaves_no_page(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    with pytest.raises(PipelineError, match=r"nothing to report on.*dvc repro"):
        tree.report()
    assert not tree.out_path.exists()


@pytest.mark.parametrize(
    ("damaged", "content"),
    [
        ("metrics/voc.json", "{"),
        ("metrics/voc.json", "[]"),
        ("stats/mask.json", "[]"),
        ("overlays/voc/index.json", '[{"file": "0.png"}]'),
        ("overlays/voc/0.png", "no picture"),
        ("plots/voc_per_class.csv", "name,score\ncat,1\n"),
        ("live/plots/metrics/train/loss.tsv", "a\tb\n1\t2\n"),
    ],
)
def test_damaged_input_is_an_error_that_names_the_file(
    tree: Tree, damaged: str, content: str
) -> None:
    (tree.reports_dir / damaged).write_text(content)
    with pytest.raises(PipelineError, match=re.escape(damaged)):
        tree.report()
    assert not tree.out_path.exists()


# -- sections --------------------------------------------------------------------------------------


def test_dag_shows_counts_and_what_was_skipped(page: str) -> None:
    pipeline = section(page, "pipeline")
    stages = re.findall(r"<h3>(\w+)</h3>", pipeline)
    assert stages == [
        "embed",
        "retrieve",
        "mask",
        "pseudo_label",
        "train",
        "predict_bench",
        "score",
        "report",
    ]
    text = text_of(pipeline)
    assert "photos images 1,500 skipped 0 cached 40" in text
    assert "iterations 1,234" in text
    assert "audit photos" in text
    assert "overlaps 3" in text
    assert "empty masks" not in text
    details = pipeline.split("<details>")[1]
    assert "2 skipped by embed (tars)" in details
    assert "00000.tar:a.jpg" in details
    assert "truncated" in details


def test_long_list_of_skipped_items_is_cut(tree: Tree) -> None:
    items = [{"item": f"photo-{number}", "reason": "empty file"} for number in range(1000)]
    write_json(
        tree.reports_dir / "stats" / "mask.json",
        {"stage": "mask", "items": 0, "skipped": 4000, "seconds": 1.0, "skipped_items": items},
    )
    pipeline = section(tree.report(), "pipeline")
    assert "photo-199<" in pipeline
    assert "photo-200<" not in pipeline
    assert "and 3800 more" in pipeline


def test_demo_world_is_a_stage_of_its_own_once_it_was_drawn(tree: Tree) -> None:
    write_json(
        tree.reports_dir / "stats" / "world-demo.json",
        {"stage": "world", "items": 10, "skipped": 0, "seconds": 1.0, "skipped_items": []},
    )
    assert "<h3>world</h3>" in section(tree.report(), "pipeline")


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
        *("Benchmark", "mIoU", "DenseCLIP mIoU", "Seen mIoU", "Unseen mIoU", "hIoU")
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


def test_best_and_worst_predictions_are_shown_apart_from_others(page: str) -> None:
    predictions = section(page, "predictions")
    assert predictions.count("<img") == 3
    assert predictions.index("image-best-0") < predictions.index("image-best-1")
    assert "image-spread-3" not in predictions
    assert "90.5 mIoU" in predictions
    assert "\u2013 mIoU" in predictions


def header_pictures(page: str) -> list[str]:
    return re.findall(r"Prediction on image ([\w-]+)", page.split("</header>")[0])


def test_header_shows_predictions_that_are_neither_best_nor_worst(tree: Tree) -> None:
    path = tree.reports_dir / "overlays/voc/index.json"
    scores = [10.0, 60.0, 20.0, None, 50.0, 40.0, 30.0]
    entries = [
        {"file": "0.png", "image_id": f"at-{score}".replace(".0", ""), "miou": score, "kind": kind}
        for kind in ("best", "spread", "worst")
        for score in (scores if kind == "spread" else [99.0])
    ]
    write_json(path, entries)
    page = tree.report()
    assert header_pictures(page) == ["at-40", "at-20"]
    assert "6 images picked evenly" in text_of(page)


def test_header_shows_the_only_picture_once_and_none_without_a_score(tree: Tree) -> None:
    path = tree.reports_dir / "overlays/voc/index.json"
    entry = {"file": "0.png", "image_id": "only", "miou": 50.0, "kind": "spread"}
    write_json(path, [entry])
    assert header_pictures(tree.report()) == ["only"]
    write_json(path, [entry | {"miou": None}])
    assert header_pictures(tree.report()) == []


def test_strips_show_the_first_images_and_negatives(page: str) -> None:
    archives = section(page, "archives")
    assert archives.count("<img") == 14
    text = text_of(archives)
    assert "negatives 2 images 0.499 0.498" in text
    assert "bird 4 images 0.499 0.498 0.497 0.496 negatives" in text


def test_samples_cover_categories_and_ranks(page: str) -> None:
    labels = section(page, "labels")
    assert set(re.findall(r"rank (\d+)", labels)) == {"1", "2", "3", "4"}
    for name in ("cat", "dog", "bird"):
        assert f"dense labels over the image of {name}" in labels
    num_samples = labels.count("<h3>")
    for caption in ("image", "pseudo-mask", "dense labels", "training saw"):
        assert labels.count(f"<figcaption>{caption}</figcaption>") == num_samples
    assert "target <b>fused</b>" in labels


def test_category_keeps_its_colour_in_every_section(page: str) -> None:
    chip = f'--colour:{category_colour(3)}"></i><span>bird</span>'
    for name in ("scores", "archives", "labels"):
        assert chip in section(page, name)


def test_images_missing_from_the_shards_are_left_out(tree: Tree) -> None:
    write_archive_shards(tree, CATEGORIES, per_category=3, size=(8, 8))
    rows_of_more = tree.archives_path.read_bytes()
    write_archive_shards(tree, CATEGORIES[:1], per_category=2, size=(8, 8))
    tree.archives_path.write_bytes(rows_of_more)
    assert section(tree.report(), "archives").count("<img") == 2


def test_similarities_that_imported_archives_do_not_tell_are_unknown(tree: Tree) -> None:
    rows = [replace(row, similarity=math.nan) for row in read_archives(tree.archives_path)]
    write_archives(tree.archives_path, rows)
    page = tree.report()
    assert "similarity unknown" in text_of(section(page, "labels"))
    assert "bird 4 images unknown unknown" in text_of(section(page, "archives"))


def test_curves_have_axes_and_loss_comes_first(page: str) -> None:
    training = section(page, "training")
    assert re.findall(r"<h3>(.*?)</h3>", training) == ["train/loss", "train/learning_rate"]
    assert ">step</text>" in training
    assert ">loss</text>" in training
    assert "10 at step 10, 2 at step 50" in training


def test_settings_are_listed(page: str) -> None:
    notes = text_of(page.split('<footer id="notes">')[1])
    assert "iterations 1,234" in notes
    assert "training target fused" in notes
    assert "seed 7" in notes


@pytest.mark.parametrize("size", [(1, 1), (3, 400)])
def test_images_of_odd_sizes(tree: Tree, size: tuple[int, int]) -> None:
    write_archive_shards(tree, CATEGORIES, per_category=1, size=size)
    checked(tree.report())


def test_hundreds_of_categories(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    names = [f"category {number}" for number in range(300)]
    write_archive_shards(tree, names, per_category=1, size=(6, 8))
    page = tree.report()
    checked(page)
    assert "and 200 more archives" in section(page, "archives")
    assert "and 200 more" in page.split("</header>")[0]


def test_page_stays_small_whatever_the_images(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    names = [f"category {number}" for number in range(25)]
    write_archive_shards(tree, names, per_category=8, size=(96, 120))
    rng = np.random.default_rng(0)
    overlays_dir = tree.reports_dir / "overlays/voc"
    overlays_dir.mkdir(parents=True)
    blocks = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((600, 600), Image.Resampling.NEAREST).save(
        overlays_dir / "0.png"
    )
    entry = {"file": "0.png", "image_id": "0", "miou": 1.0}
    kinds = ["best"] * 6 + ["worst"] * 6
    write_json(overlays_dir / "index.json", [entry | {"kind": kind} for kind in kinds])
    assert len(tree.report().encode()) < MAX_PAGE_BYTES


# -- published tables and ablations ----------------------------------------------------------------

PUBLISHED = ROOT / "reports/published.yaml"
REAL_VOC = {
    "model": "zutis",
    "encoder": "ViT-B-16-quickgelu/openai",
    "split": "trainval",
    "num_categories": "20",
    "corruption": "none",
}
ONE_TABLE = """\
tables:
  - id: some-1
    source: Some, Table 1
    title: Some title
    columns: {voc: VOC, coco: COCO, speed: Images/s}
    rows:
      - {model: Theirs & <b>, backbone: RN50, values: {voc: 12.34, speed: 7}}
    ours:
      - {metrics: "{column}*", images: 60, protocol: {encoder: [A, B], corruption: "{column} 1"},
         values: {voc: miou, coco: groups.known.miou}}
    note: Some note.
"""


def write_metrics(tree: Tree, name: str, protocol: dict[str, str], **scores: object) -> None:
    lines = [f"{key}: {value}" for key, value in protocol.items()]
    write_json(tree.reports_dir / f"metrics/{name}.json", scores | {"protocol": lines})


def write_published(tree: Tree, content: str) -> None:
    (tree.reports_dir / "published.yaml").write_text(content)


def ours_of(page: str) -> list[str]:
    """Text of this project's rows in the section of published tables."""
    rows = re.findall(r'<tr class="ours">.*?</tr>', section(page, "published"), re.DOTALL)
    return [text_of(row).strip() for row in rows]


def filled(page: str) -> list[str]:
    """Those of this project's rows that hold a number."""
    return [row for row in ours_of(page) if re.search(r" \d+\.\d( |$)", row)]


def test_page_has_no_published_tables_without_the_file(page: str) -> None:
    assert "published" not in checked(page).ids


def test_the_demo_is_never_shown_beside_the_papers(tree: Tree) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    demo = REAL_VOC | {"encoder": "tiny_clip.json/tiny_clip.safetensors", "num_categories": "16"}
    write_metrics(tree, "voc", demo, miou=57.21, ap=23.85, ap50=49.98, ap75=22.14, n_images=300)
    page = tree.report()
    checked(page)
    published = section(page, "published")
    assert ours_of(page)
    assert filled(page) == []
    assert "voc.json: encoder is tiny_clip.json/tiny_clip.safetensors, not ViT-B-16" in published
    assert "<details open>" not in published


def test_numbers_of_the_same_benchmark_and_encoder_stand_beside_the_papers(tree: Tree) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    write_metrics(
        tree, "voc", REAL_VOC, miou=61.24, ap=13.06, ap50=30.04, ap75=10.88, n_images=2913
    )
    page = tree.report()
    assert filled(page) == [
        "this project ViT-B/16 13.1 30.0 10.9",
        "this project ViT-B/16 not run not run not run 13.1 30.0 10.9",
        "this project ViT-B/16 61.2 30.0",
        "this project ViT-B/16 30.0",
    ]
    assert section(page, "published").count("<details open>") == len(filled(page))


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "ViT-B-32-quickgelu/openai"},
        {"split": "val"},
        {"num_categories": "16"},
        {"corruption": "spatter 1"},
        {"model": "denseclip"},
        {"n_images": 2912},
    ],
)
def test_one_difference_in_the_protocol_is_enough(tree: Tree, change: dict[str, object]) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    protocol = REAL_VOC | {key: str(value) for key, value in change.items() if key != "n_images"}
    write_metrics(tree, "voc", protocol, ap=13.06, n_images=change.get("n_images", 2913))
    assert filled(tree.report()) == []


def test_corrupted_benchmarks_are_told_apart_by_name_and_level(tree: Tree) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    protocol = {
        "model": "denseclip",
        "encoder": "RN50x16-quickgelu/openai",
        "split": "val",
        "background_scored": "False",
    }
    write_metrics(tree, "voc20_a", protocol | {"corruption": "spatter 3"}, miou=38.04)
    write_metrics(tree, "voc20_b", protocol | {"corruption": "none"}, miou=50.94)
    clean, spatter = filled(tree.report())
    assert clean == "this project, DenseCLIP alone RN50x16 50.9 not run not run"
    assert spatter.startswith("this project, level 3 RN50x16 not run")
    assert spatter.endswith("not run 38.0 not run")


def test_table_cells_of_print_of_ours_and_of_neither(tree: Tree) -> None:
    write_published(tree, ONE_TABLE)
    protocol = {"encoder": "B", "corruption": "coco 1"}
    write_metrics(tree, "coco_x", protocol, groups={"known": {"miou": 9.96}}, n_images=60)
    page = tree.report()
    checked(page)
    published = section(page, "published")
    assert "Theirs &amp; &lt;b&gt;" in published
    assert "RN50 12.3 \u2013 7.0" in text_of(published)
    assert ours_of(page) == ["this project not run 10.0 \u2013"]
    assert "Some note." in published


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("voc: 12.34", "voc: high"),
            r"published\.yaml: tables\.0\.rows\.0\.values\.voc: .*'high'",
        ),
        (("voc: 12.34", "mIoU: 1"), r"published\.yaml: tables\.0: .*'mIoU' is no column of some-1"),
        (("    title: Some title\n", ""), r"key 'tables\.0\.title' is missing"),
        (("    note:", "    notes:"), r"unknown key 'tables\.0\.notes'"),
        (("tables:", "tables: ["), r"published\.yaml: not valid YAML"),
    ],
)
def test_wrong_published_tables_are_named_by_their_place(
    tree: Tree, change: tuple[str, str], message: str
) -> None:
    write_published(tree, ONE_TABLE.replace(*change))
    with pytest.raises(PipelineError, match=message):
        tree.report()


def test_two_tables_of_one_id_are_refused() -> None:
    (table,) = YAML(typ="safe", pure=True).load(ONE_TABLE)["tables"]
    with pytest.raises(ValueError, match="'some-1' comes twice"):
        Published.model_validate({"tables": [table, table]})


def test_shipped_tables_agree_with_themselves(tmp_path: Path) -> None:
    """The papers' harmonic means, and the gains that ZUTIS prints, follow from the numbers."""
    tables = {table.id: table for table in read_section(PUBLISHED, Published).tables}
    assert len(tables) == len(read_published(PUBLISHED, tmp_path)) == 20
    means = 0
    for table in tables.values():
        for row in table.rows:
            values = row.values
            if {"seen", "unseen", "hiou"} <= values.keys():
                seen, unseen = values["seen"], values["unseen"]
                assert values["hiou"] == pytest.approx(
                    2 * seen * unseen / (seen + unseen), abs=0.15
                )
                means += 1
    assert means == 33
    for name in list_ablations():
        assert set(read_ablation(name).tables) <= tables.keys()
    gains = {
        "zutis-7": {"ap": 2.6, "ap50": 5.2, "ap75": 2.4},
        "zutis-8": {"miou": 7.6, "ap50": 2.7},
    }
    for name, gain in gains.items():
        without, with_ = (row.values for row in tables[name].rows)
        assert {key: round(with_[key] - without[key], 1) for key in gain} == gain


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


# -- charts and pictures ---------------------------------------------------------------------------


def points_of(line: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.split())]


def test_line_chart_maps_ends_to_corners() -> None:
    chart = line_chart("loss", [(0, 0.0), (100, 8.0)])
    first, last = points_of(chart["raw"])
    assert first == (chart["left"], chart["bottom"])
    assert last == (chart["right"], chart["top"])
    assert [tick["label"] for tick in chart["y_ticks"]] == ["0", "2", "4", "6", "8"]


@pytest.mark.parametrize("points", [[], [(1, float("nan"))], [(5, 2.0)], [(1, 3.0), (2, 3.0)]])
def test_line_chart_of_few_or_equal_points(
    points: list[tuple[float, float]],
) -> None:
    chart = line_chart("loss", points)
    for x, y in points_of(chart["raw"]):
        assert chart["left"] <= x <= chart["right"]
        assert chart["top"] <= y <= chart["bottom"]
    assert (chart["raw"] == "") == (chart["summary"] == "no finite values")


def test_line_chart_averages_long_curves_and_keeps_inside() -> None:
    rng = np.random.default_rng(0)
    chart = line_chart("loss", [(step, float(rng.normal())) for step in range(20_000)])
    points = points_of(chart["raw"])
    assert 100 < len(points) <= 300
    assert all(chart["top"] <= y <= chart["bottom"] for _, y in points)
    assert {tick["label"] for tick in chart["x_ticks"]} >= {"5k", "10k", "15k"}


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.3, 2.9, [0.0, 1.0, 2.0, 3.0]),
        (-3.0, 3.0, [-4.0, -2.0, 0.0, 2.0, 4.0]),
        (2e-6, 9e-6, [2e-6, 4e-6, 6e-6, 8e-6, 1e-5]),
        (5.0, 5.0, [5.0]),
    ],
)
def test_ticks_are_round_and_span_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 4) == pytest.approx(ticks)


def test_painted_labels_tell_background_category_and_ignored_apart() -> None:
    image = np.full((2, 9, 3), (200, 100, 0), dtype=np.uint8)
    labels = np.array([[0, 0, 0, 1, 1, 1, -1, -1, -1]] * 2)
    painted = paint_labels(image, labels).astype(int)
    assert painted.shape == image.shape
    background, category, ignored = painted[:, :3], painted[:, 3:6], painted[:, 6:]
    assert (background == background[..., :1]).all()
    assert background.min() > 150
    red = int(category_colour(1)[1:3], 16)
    assert (category[..., 0] > category[..., 1]).all()
    assert abs(category[0, 0, 0] - (0.25 * 100 + 0.75 * red)) <= 1
    assert set(np.unique(ignored)) == {70, 245}


def test_painting_labels_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        paint_labels(np.zeros((2, 2, 3), dtype=np.uint8), np.zeros((2, 3), dtype=int))


def test_fit_labels_takes_the_nearest_label() -> None:
    labels = np.array([[1, 2], [3, -1]])
    assert fit_labels(labels, (4, 2)).tolist() == [[1, 1, 2, 2], [3, 3, -1, -1]]
    assert fit_labels(labels, (1, 1)).shape == (1, 1)
    assert fit_labels(labels, (2, 2)).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("size", "fitted"), [((200, 100), (50, 25)), ((1, 400), (1, 50)), ((20, 10), (20, 10))]
)
def test_fit_image_bounds_the_long_side(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_image(Image.new("RGB", size), 50).size == fitted


@pytest.mark.parametrize(
    ("size", "enlarged"),
    [((96, 96), (288, 288)), ((100, 30), (200, 60)), ((1, 1), (288, 288)), ((200, 9), (200, 9))],
)
def test_enlarge_image_repeats_pixels_a_whole_number_of_times(
    size: tuple[int, int], enlarged: tuple[int, int]
) -> None:
    pixels = np.arange(size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    result = enlarge_image(Image.fromarray(pixels), 288)
    assert result.size == enlarged
    factor = enlarged[0] // size[0]
    assert (np.asarray(result) == pixels.repeat(factor, axis=0).repeat(factor, axis=1)).all()


@pytest.fixture
def noise(rng: np.random.Generator) -> Callable[[int], Image.Image]:
    def make(side: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))

    return make


def test_picture_lowers_quality_until_it_fits(noise: Callable[[int], Image.Image]) -> None:
    image = noise(96)
    best = picture(image, alt="noise", max_bytes=100_000)
    small = picture(image, alt="noise", max_bytes=5_000)
    assert len(str(small["uri"])) <= 5_000 * 4 / 3 + 40 < len(str(best["uri"]))
    assert (small["width"], small["height"], small["alt"]) == (96, 96, "noise")
