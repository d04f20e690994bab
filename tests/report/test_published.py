"""The papers' tables, and when this project's numbers stand beside them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.ablations.definitions import list_ablations, read_ablation
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.params.reading import read_section
from pipeline.report.published import PublishedResults, read_published
from tests.report.helpers import PUBLISHED, Tree, checked, section, text_of, write_published

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
        PublishedResults.model_validate({"tables": [table, table]})


def test_shipped_tables_agree_with_themselves(tmp_path: Path) -> None:
    """The papers' harmonic means, and the gains that ZUTIS prints, follow from the numbers."""
    tables = {table.id: table for table in read_section(PUBLISHED, PublishedResults).tables}
    assert len(tables) == len(read_published(PUBLISHED, tmp_path)) == 21
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


def test_results_that_differ_from_the_runs_count_likewise(tree: Tree) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    scores = {"ap": 13.06, "ap50": 30.04, "ap75": 10.88, "n_images": 2913}
    write_metrics(tree, "voc_best_ViT-B-16-quickgelu-openai", REAL_VOC, **scores)
    assert filled(tree.report())[0] == "this project ViT-B/16 13.1 30.0 10.9"
    (tree.reports_dir / "metrics/voc_best_ViT-B-16-quickgelu-openai.json").unlink()
    write_metrics(tree, "voc_val_best", REAL_VOC, **scores)  # of another shipped benchmark
    assert filled(tree.report()) == []


def test_accuracies_stand_beside_those_of_table_6(tree: Tree) -> None:
    write_published(tree, PUBLISHED.read_text(encoding="utf-8"))
    names = ("pixel_acc_seen", "pixel_acc_unseen", "pixel_acc")
    names += ("mean_acc_seen", "mean_acc_unseen", "mean_acc")
    scores = {name: 10.0 + place for place, name in enumerate(names)}
    protocol = REAL_VOC | {"split": "val"}
    write_metrics(tree, "voc_unseen", protocol, **scores)
    row = "this project ViT-B/16 10.0 11.0 12.0 13.0 14.0 15.0"
    assert row in filled(tree.report())
