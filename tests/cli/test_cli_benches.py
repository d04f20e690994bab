"""Benchmarks by name on the command line: listed, found, and told where to get."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.cli.benches import find_bench, result_name, shipped_bench
from pipeline.errors import PipelineError
from pipeline.params.benches import CorruptionParams, VocBench
from pipeline.presets import bench_text, list_benches

PARAMS = Path("mine.yaml")


@pytest.fixture
def own(tmp_path: Path) -> dict[str, VocBench]:
    """The section `benches` of somebody's params."""
    return {"voc": VocBench(format="voc", root=tmp_path, split="mine")}


def test_the_shipped_benchmarks_are_listed_with_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / shipped_bench("voc").root).mkdir(parents=True)
    lines = CliRunner().invoke(app, ["benches"]).output.splitlines()
    assert [line.split()[0] for line in lines] == [name for name, _ in list_benches()]
    states = {line.split()[0]: line[21:28] for line in lines}
    assert (states["voc"], states["coca"]) == ("found  ", "no data")
    assert all(
        line.endswith(summary) for line, (_, summary) in zip(lines, list_benches(), strict=True)
    )


def test_a_shipped_benchmark_is_shown_in_full() -> None:
    done = CliRunner().invoke(app, ["benches", "coco20k"])
    assert done.output == bench_text("coco20k")
    with pytest.raises(PipelineError, match="'coco20' is shipped; did you mean 'coco20k'"):
        bench_text("coco20")


@pytest.mark.parametrize("name", [name for name, _ in list_benches()])
def test_every_shipped_benchmark_can_be_read(name: str) -> None:
    assert shipped_bench(name).root.parts[:2] == ("data", "raw")


def test_the_params_go_before_what_is_shipped(own: dict[str, VocBench], tmp_path: Path) -> None:
    assert find_bench(own, "voc", params_path=PARAMS).split == "mine"
    assert find_bench(own, "voc_val", params_path=PARAMS, root=tmp_path).split == "val"


def test_options_change_an_entry(own: dict[str, VocBench], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    bench = find_bench(
        own, "voc", params_path=PARAMS, root=tmp_path / "other", corruption="shot_noise:4"
    )
    assert (bench.root, bench.split) == (tmp_path / "other", "mine")
    assert bench.corruption == CorruptionParams(name="shot_noise", level=4)


@pytest.mark.parametrize("text", ["fog", "fog:6", "fog:", "fog:high"])
def test_a_corruption_needs_a_level(own: dict[str, VocBench], text: str) -> None:
    with pytest.raises(PipelineError, match=r"--corruption: .* level from 1 to 5"):
        find_bench(own, "voc", params_path=PARAMS, corruption=text)


def test_an_unknown_benchmark_lists_the_known_ones(own: dict[str, VocBench]) -> None:
    with pytest.raises(PipelineError) as caught:
        find_bench(own, "nope", params_path=PARAMS)
    assert str(caught.value) == (
        "mine.yaml: 'nope' is not under `benches:`; there are: voc; `pipeline benches` lists the "
        "shipped ones"
    )


def test_missing_data_of_a_shipped_benchmark_tell_where_to_get_them(
    own: dict[str, VocBench], tmp_path: Path
) -> None:
    with pytest.raises(PipelineError) as caught:
        find_bench(own, "coco20k", params_path=PARAMS, root=tmp_path / "none")
    message = str(caught.value)
    assert f"benches.coco20k.root: {tmp_path / 'none'}: no such folder" in message
    assert "https://cocodataset.org/#download" in message
    assert "data/raw/coco/coco_20k_filenames.txt" in message
    own["photos"] = own["voc"].model_copy(update={"root": tmp_path / "none"})
    with pytest.raises(PipelineError, match="none: no such folder; put the data there") as caught:
        find_bench(own, "photos", params_path=PARAMS)
    assert "\n" not in str(caught.value)


def test_results_are_named_after_what_is_unusual() -> None:
    assert result_name("voc") == "voc"
    assert result_name("voc", "denseclip") == "voc_denseclip"
    assert result_name("voc", "denseclip", "spatter:2") == "voc_denseclip_spatter_2"
