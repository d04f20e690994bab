"""A project's folders as the other stages leave them, and readers of the report's page."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from dvclive import Live
from PIL import Image

from pipeline.files import write_json
from pipeline.formats.images import encode_jpeg, encode_label, encode_png
from pipeline.formats.tables import ArchiveRow, write_archives
from pipeline.stages.report import run
from tests.formats.shard_folders import write_shards
from tests.paths import ROOT

CATEGORIES = ["cat", 'dog & <b>"pup"</b>', "bird"]
EVIL = "<script>alert('x')</script>"
MAX_PAGE_BYTES = 5_000_000
VOID_TAGS = {"img", "meta", "link", "rect", "line", "polyline"}
PUBLISHED = ROOT / "reports/published.yaml"


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


def write_tree(root: Path) -> Tree:
    """Output of every stage for three categories with four images each, and two negatives."""
    tree = Tree(root)
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


def write_archive_shards(
    tree: Tree,
    categories: list[str],
    *,
    per_category: int,
    size: tuple[int, int],
    num_negatives: int = 0,
    several_objects: bool = False,
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
            if several_objects:
                mask = mask * np.where(np.arange(size[1]) < size[1] // 2, 1, 2).astype(np.uint8)
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
    noted = {"pseudo_label": {"categories": list(categories)}}
    write_shards(samples, tree.labels_dir, shard_size=5, settings=noted)


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


def write_published(tree: Tree, content: str) -> None:
    (tree.reports_dir / "published.yaml").write_text(content)


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
