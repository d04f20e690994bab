"""The papers' tables made again, on tiny folders and with the demo's networks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.ablations.definitions import read_ablation
from pipeline.benchmarks.voc import VocWriter
from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.params.reading import parse_params, read_section
from pipeline.report.inputs import NO_VALUE
from pipeline.report.published import PublishedResults, Way
from pipeline.reproduce.recipes import recipe
from tests.conftest import encoded_image, noise_image
from tests.paths import ROOT

PUBLISHED = ROOT / "reports/published.yaml"
TABLES = """\
tables:
  - id: some-1
    source: Some, Table 1
    title: Some title
    bench: voc_val
    columns: {miou: mIoU, ap: AP}
    picture: true
    rows:
      - {model: Theirs, backbone: ViT, values: {miou: 12.3}}
      - {model: Trained, values: {miou: 50.0, ap: 10.0}}
    ours:
      - model: alone
        beside: Theirs
        run:
          - preset: demo
            model: denseclip
            params: &names {benches.voc_val.categories: demo, pseudo_label.templates: name}
        images: 3
        protocol: &protocol {model: denseclip, num_categories: 16, corruption: none}
        values: &values {miou: miou, ap: ap}
      - model: trained
        beside: Trained
        run: &trained
          - preset: demo
            params: &tiny
              <<: *names
              index.demo.root: data/raw/photos
              k: 2
              retrieve.num_negatives: 2
              retrieve.templates: name
              train.templates: name
              train.iterations: 1
              train.crop_size: 32
              train.num_queries: 4
        images: 3
        protocol: {<<: *protocol, model: zutis}
        values: *values
      - model: away
        run: [{preset: demo, checkpoint: zutis_coco_vit_b_16, bench: coca}]
        protocol: {}
        values: {miou: miou}
  - id: some-2
    also: [more]
    source: Some, Table 2
    title: Other title
    bench: voc_val
    columns: {ap50: AP50}
    rows: [{model: Trained, values: {ap50: 20.0}}]
    ours:
      - model: without suppression
        beside: Trained
        run: [{preset: demo, params: {<<: *tiny, evaluate.suppression: none}}]
        protocol: {suppression: none}
        values: {ap50: ap50}
"""

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with the tables, the demo's networks, and a benchmark of three photos."""
    folder = tmp_path / "project"
    (folder / "reports/metrics").mkdir(parents=True)
    (folder / "reports/published.yaml").write_text(TABLES)
    (folder / "models").mkdir()
    (folder / "models/demo").symlink_to(ROOT / "models/demo")
    writer = VocWriter(tmp_path / "sets/VOCdevkit/VOC2012")
    (tmp_path / "sets/photos").mkdir(parents=True)
    for number in range(3):
        labels = np.zeros((40, 48), np.uint8)
        labels[:20, : 16 * number] = 7
        photo = encoded_image(noise_image(number, 48, 40), "JPEG")
        writer.add(f"im{number}", photo, labels, (labels > 0).astype(np.uint8))
        (tmp_path / f"sets/photos/{number}.jpg").write_bytes(photo)
    writer.write_split("val", [f"im{number}" for number in range(3)])
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def call(project: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Call:
    """Function that runs `pipeline reproduce ARGS`; exit status and output, errors raised."""
    assert Path.cwd() == project

    def run(*args: str, data: str | None = str(tmp_path / "sets")) -> tuple[int, str]:
        words = ["reproduce", *args, *(["--data", data] if data else [])]
        result = CliRunner().invoke(app, words)
        if isinstance(result.exception, PipelineError):
            raise result.exception
        return result.exit_code, result.output + capfd.readouterr().out

    return run


def commands(output: str) -> list[str]:
    """The stage of every command that is printed."""
    return re.findall(r"^\$ pipeline --params \S+ (\w+)", output, flags=re.MULTILINE)


def test_the_list_says_what_can_be_run_and_what_is_missing(call: Call) -> None:
    status, output = call("list")
    assert status == 0
    lines = output.splitlines()
    assert lines[0] == "some-1: Some, Table 1: Some title"
    sets = Path.cwd().parent / "sets"
    lacks = f"data {sets}/CoCA; weights zutis_coco_vit_b_16; weights clip_vit_b_16"
    assert [line.strip() for line in lines[1:4]] == [
        "1 alone: can run now",
        "2 trained: can run now",
        f"3 away: missing: {lacks}",
    ]
    status, output = call("list", data=None)
    assert "1 alone: missing: data data/raw/VOCdevkit/VOC2012\n" in output


def test_a_dry_run_prints_commands_and_writes_nothing(call: Call, project: Path) -> None:
    before = sorted(project.rglob("*"))
    status, output = call("some-1", "--rows", "1", "--rows", "train", "--dry-run")
    assert status == 0
    assert commands(output) == ["evaluate", "embed", "retrieve", "mask", "train", "evaluate"]
    assert "--model denseclip" in output
    assert "index.demo.root: data/raw/photos, k: 2" in output
    assert "exit status" not in output
    status, output = call("some", "--dry-run")
    assert status == 3
    assert commands(output).count("train") == 1  # it is the same for both tables
    assert "missing: weights zutis_coco_vit_b_16" in output
    assert "evaluate --bench coca --checkpoint zutis_coco_vit_b_16" in output
    assert sorted(project.rglob("*")) == before


def test_a_table_is_run_and_compared_once(call: Call, project: Path) -> None:
    status, output = call("some-1", "--rows", "alone")
    assert status == 0
    assert commands(output) == ["evaluate"]
    (path,) = (project / "reports/reproduced").glob("voc_val-*/metrics/*.json")
    metrics = json.loads(path.read_text())
    gap = f"{metrics['miou'] - 12.3:+.1f}"
    row = rf"alone +mIoU +12\.3 \| +{metrics['miou']:.1f} \| +{re.escape(gap)}\n"
    assert re.search(row, output)
    assert re.search(rf"alone +AP +{NO_VALUE} \| +{metrics['ap']:.1f} \| +{NO_VALUE}\n", output)
    status, output = call("some-1", "--rows", "1")
    assert (status, commands(output)) == (0, [])
    assert re.search(row, output)
    assert "1 alone: measured\n" in call("list")[1]
    picture = ElementTree.parse(project / "reports/reproduced/some-1.svg")
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"alone", "mIoU", f"{metrics['miou']:.1f}", "12.3"} <= set(texts)


def test_a_row_that_is_trained_shares_its_stages(call: Call) -> None:
    status, output = call("some-1", "--rows", "trained")
    assert status == 0, output
    assert commands(output) == ["embed", "retrieve", "mask", "train", "evaluate"]
    assert re.search(r"trained +AP +10\.0 \| +\d+\.\d \| +-\d+\.\d\n", output)
    status, output = call("more")
    assert status == 0, output
    assert commands(output) == ["evaluate"]
    assert re.search(r"without suppression +AP50 +20\.0 \| +\d+\.\d \| ", output)


def test_a_failure_has_its_status_and_leaves_no_number(call: Call, project: Path) -> None:
    (project.parent / "sets/VOCdevkit/VOC2012/SegmentationClass/im1.png").unlink()
    status, output = call("some-1", "--rows", "alone")
    assert status == 1
    assert "exit status 1" in output
    assert re.search(rf"alone +mIoU +12\.3 \| +{NO_VALUE} \| +{NO_VALUE}", output)
    assert "1 alone: can run now" in call("list")[1]


def test_a_number_of_another_protocol_does_not_count(call: Call, project: Path) -> None:
    text = TABLES.replace("images: 3", "images: 4", 1)
    (project / "reports/published.yaml").write_text(text)
    status, output = call("some-1", "--rows", "alone")
    assert status == 1
    assert re.search(
        r"^reports/reproduced/voc_val-.*\.json: 3 images, not 4$", output, re.MULTILINE
    )
    assert "exit status" not in output


def test_missing_data_have_a_status_of_their_own(call: Call) -> None:
    status, output = call("some-1", "--rows", "alone", data=None)
    assert status == 3
    assert "missing: data data/raw/VOCdevkit/VOC2012\n" in output
    assert "pipeline benches NAME" in output
    assert commands(output) == []


def test_numbers_of_the_project_count_too(call: Call, project: Path) -> None:
    text = TABLES.replace(
        "      - model: alone\n", "      - model: alone\n        metrics: mine*\n"
    )
    (project / "reports/published.yaml").write_text(text)
    lines = ["model: denseclip", "num_categories: 16", "corruption: none"]
    metrics = {"miou": 11.3, "ap": 1.0, "n_images": 3, "protocol": lines}
    (project / "reports/metrics/mine.json").write_text(json.dumps(metrics))
    status, output = call("some-1", "--rows", "alone")
    assert (status, commands(output)) == (0, [])
    assert re.search(r"alone +mIoU +12\.3 \| +11\.3 \| +-1\.0\n", output)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["some-3"], r"'some-3' is no table; did you mean some-2"),
        (["some-1", "--rows", "7"], r"--rows: 7: no such row; there are: some-1: alone"),
        (["som"], r"'som' is no table"),
    ],
)
def test_unknown_names_are_refused(call: Call, args: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        call(*args)


def test_outside_of_a_project_it_says_so(call: Call, project: Path) -> None:
    (project / "reports/published.yaml").unlink()
    with pytest.raises(PipelineError, match=r"reports/published\.yaml: no such file here"):
        call("list")


def test_size_and_speed_need_no_weights(project: Path) -> None:
    words = ["--params", str(project / "params.yaml"), "measure", "--out", "network.json"]
    (project / "params.yaml").write_text(
        "categories: [cat]\nindex: {a: {root: a}}\n"
        "train: {encoder: {model: models/demo/tiny_clip.json, pretrained: none.safetensors},\n"
        "  crop_size: 32, num_heads: 4}\n"
    )
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    measured = json.loads((project / "network.json").read_text())
    assert measured["images_per_s"] > 0
    assert 0 < measured["encoder_params_m"] < 2
    assert "input: one image, 32 x 32" in measured["protocol"]


# -- the shipped tables ----------------------------------------------------------------------------


def shipped() -> list[tuple[str, str, Way, str, str]]:
    return [
        (table.id, row.name, way, table.bench, column)
        for table in read_section(PUBLISHED, PublishedResults).tables
        for row in table.ours
        for way in row.run
        for column in row.values
        if not way.columns or column in way.columns
    ]


def test_every_row_of_ours_says_how_it_is_made() -> None:
    tables = read_section(PUBLISHED, PublishedResults).tables
    for table in tables:
        for row in table.ours:
            columns = {column for way in row.run for column in way.columns or row.values}
            assert columns >= row.values.keys(), (table.id, row.name)
    sources = " ".join(table.source for table in tables)
    for number in range(1, 10):
        assert f"ZUTIS, Table {number}" in sources
    # Rows in print that are this project's own systems have a counterpart.
    own = ("ZUTIS", "MaskCLIP", "DenseCLIP", "stop-gradient", "temperature", "copy-paste")
    for table in tables:
        beside = [table.counterpart(row) for row in table.ours]
        for row in table.rows:
            if any(row.model.startswith(name) for name in own):
                assert row in beside, (table.id, row.model, row.backbone)


def test_the_ways_of_the_shipped_tables_are_params_and_commands() -> None:
    made = set()
    for table, name, way, bench, column in shipped():
        if way.ablation:
            labels = [variant.label for variant in read_ablation(way.ablation).variants]
            assert way.variant in labels, (table, name)
        done = recipe(way, bench=bench, column=column, data=Path("/sets"))
        parse_params(dict(done.params))
        assert "data/raw" not in json.dumps(done.params)
        made.add(done.steps[-1].folder)
    assert len(made) > 100  # of which 80 are the corruptions


def test_the_unseen_categories_are_left_out_of_training() -> None:
    way = Way(preset="zutis-coco", unseen=True)
    made = recipe(way, bench="coco_unseen", column="ap")
    assert len(made.params["categories"]) == 65
    assert "toaster" not in made.params["categories"]
    assert "--open-vocabulary" in made.steps[-1].words


def test_what_decides_a_step_names_its_folder() -> None:
    def folders(**fields: object) -> list[Path]:
        way = Way(preset="zutis-voc", **fields)
        return [step.folder for step in recipe(way, bench="voc", column="ap").steps]

    usual = folders()
    scored = folders(params={"evaluate.temperature": 1.0})
    trained = folders(params={"train.stop_gradient": False})
    fewer = folders(params={"k": 100})
    assert [old == new for old, new in zip(usual, scored, strict=True)] == [True] * 5 + [False]
    assert [old == new for old, new in zip(usual, trained, strict=True)] == [True] * 4 + [False] * 2
    assert [old == new for old, new in zip(usual, fewer, strict=True)] == [True] * 2 + [False] * 4
    with pytest.raises(PipelineError, match=r"ablation temperature has no variant '7'; there are"):
        folders(ablation="temperature", variant="7")
    with pytest.raises(PipelineError, match=r"unknown key 'train\.stop'"):
        folders(params={"train.stop": 1})
