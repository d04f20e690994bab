"""`--dry-run` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import PipelineError
from tests.conftest import encoded_image, noise_image
from tests.stages.tiny_workspace import content

PARAMS = """\
categories: [cat, dog]
index: {{pool: {{root: images}}}}
embed: {{encoder: {encoder}}}
pseudo_label: {{encoder: {encoder}}}
train: {{encoder: {encoder}, iterations: 30, batch_size: 4, labels: data/masks}}
"""


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
