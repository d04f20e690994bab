"""`--dry-run` from the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import PipelineError
from pipeline.formats.tables import ArchiveRow, write_archives
from tests.conftest import encoded_image, noise_image
from tests.stages.tiny_training import write_labels
from tests.stages.tiny_workspace import content

PARAMS = """\
categories: [cat, dog]
index: {{pool: {{root: images}}}}
embed: {{encoder: {encoder}}}
pseudo_label: {{encoder: {encoder}}}
train: {{encoder: {encoder}, iterations: 30, batch_size: 4, labels: data/masks}}
"""


ROW = ArchiveRow(
    category="cat",
    label_id=1,
    rank=1,
    key="a",
    similarity=0.5,
    source="pool",
    path="images/0.png",
    member=None,
    offset=None,
    width=24,
    height=24,
    sha256="0" * 64,
)


@pytest.fixture
def workspace(
    tmp_path: Path, tiny_clip: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    model, weights = tiny_clip
    encoder = f"{{model: {model}, pretrained: {weights}}}"
    (tmp_path / "params.yaml").write_text(PARAMS.format(encoder=encoder))
    (tmp_path / "images").mkdir()
    for number in range(3):
        data = encoded_image(noise_image(number, 24, 24))
        (tmp_path / f"images/{number}.png").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def said(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_dry_run_says_what_it_reads_and_writes_and_does_neither(workspace: Path) -> None:
    before = content(workspace)
    text = said("embed", "--source", "pool", "--dry-run")
    assert "writes   data/embeddings/pool\n" in text
    assert "items    3 in 1 shards of 10000" in text
    assert "time     unknown" in text
    assert content(workspace) == before
    said("embed", "--source", "pool")
    text = said("embed", "--source", "pool", "--dry-run")
    assert "data/embeddings/pool, in place of what is there" in text
    assert "done     about 3 of 3" in text
    assert "a second" in text


@pytest.mark.usefixtures("workspace")
def test_a_missing_input_is_named_with_what_makes_it() -> None:
    for words, maker in (
        (["retrieve"], "embed"),
        (["mask"], "retrieve"),
        (["pseudo_label"], "mask"),
        (["train"], "mask"),
    ):
        with pytest.raises(PipelineError, match=f"missing; run `pipeline {maker}` first"):
            said(*words, "--dry-run")


def test_an_output_that_could_not_be_written_is_found_out(workspace: Path) -> None:
    (workspace / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot be written"):
        said("embed", "--source", "pool", "--out", "file/x", "--dry-run")


def add_params(text: str) -> None:
    path = Path("params.yaml")
    path.write_text(path.read_text() + text)


def test_a_round_says_what_it_would_label_train_and_judge(workspace: Path) -> None:
    add_params("rounds: {one: {after: models/zutis, held_out: 0.4}}\n")
    write_labels(Path("data/masks"))
    with pytest.raises(PipelineError, match=r"models/zutis: missing; run `pipeline train` first"):
        said("relabel", "--name", "one", "--dry-run")
    Path("models/zutis").mkdir(parents=True)
    with pytest.raises(PipelineError, match="run `pipeline relabel --name one` first"):
        said("retrain", "--name", "one", "--dry-run")
    Path("data/rounds/one").mkdir(parents=True)
    before = content(workspace)
    relabel = said("relabel", "--name", "one", "--dry-run")
    assert "writes   data/rounds/one, in place" in relabel
    found = re.search(r"items    (\d+) in 1 shards of 250", relabel)
    assert found
    retrain = said("retrain", "--name", "one", "--dry-run")
    assert "items    30 iterations of 4 images" in retrain
    left = 9 - int(found[1])
    assert 0 < left < 9
    assert f"items    {2 * left} images: {left} held-out ones, by both checkpoints" in retrain
    assert content(workspace) == before


def test_an_audit_says_what_it_would_score(workspace: Path) -> None:
    add_params("audits: {one: {root: truth, categories: [cat, dog]}}\n")
    write_labels(Path("data/masks"))
    write_labels(Path("data/labels"))
    words = ("audit", "--name", "one", "--dry-run")
    with pytest.raises(PipelineError, match="run `pipeline retrieve` first"):
        said(*words)
    write_archives(Path("data/archives.parquet"), [ROW])
    with pytest.raises(PipelineError, match="truth/SegmentationClass: no such folder"):
        said(*words)
    Path("truth/SegmentationClass").mkdir(parents=True)
    before = content(workspace)
    text = said(*words)
    assert "items    10 items: 1 archive images and 9 samples, where there is truth" in text
    assert "time     unknown" in text
    assert content(workspace) == before


def test_a_report_says_what_it_would_show(workspace: Path) -> None:
    with pytest.raises(PipelineError, match="nothing to report on"):
        said("report", "--dry-run")
    write_archives(Path("data/archives.parquet"), [ROW])
    before = content(workspace)
    text = said("report", "--dry-run")
    assert "reads    data/archives.parquet\n" in text
    assert "reads    data/masks, which is missing" in text
    assert re.search(r"items    \d+ sections; not run: .*benches.*", text)
    assert content(workspace) == before


def test_names_of_evaluate_that_have_no_effect_are_refused(workspace: Path) -> None:
    params = (workspace / "params.yaml").read_text()
    for evaluate, message in (
        ("{min_scores: {cta: 0.5}}", "min_scores: 'cta' is not among .* did you mean cat"),
        ("{others: [dog]}", "others: 'dog' is a category"),
        ("{others: [sky, Sky]}", "others: 'Sky' is listed twice"),
    ):
        (workspace / "params.yaml").write_text(f"{params}evaluate: {evaluate}\n")
        with pytest.raises(PipelineError, match=message):
            said("embed", "--source", "pool", "--dry-run")
