"""What a stage starts with, and what it leaves behind about itself."""

from __future__ import annotations

import os
import random
import re
from contextlib import nullcontext
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine.dry_run import last_rate
from pipeline.engine.progress import StageRun
from pipeline.engine.runtime import make_runtime, seed_generators
from pipeline.errors import PipelineError
from pipeline.files import read_json


def test_a_finished_run_writes_its_counts_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats_path = tmp_path / "stats" / "embed.json"
    with StageRun("embed", stats_path=stats_path, total=6, unit="image") as run:
        run.advance(3)
        run.advance()
        run.skip("photos/broken.jpg", "truncated")
        run.skip("photos/empty.png", "zero bytes")
        run.count_in_run("cached", 2)
        run.count_in_run("cached")
        run.count("animated")

    stats = read_json(stats_path)
    assert list(stats) == [
        "stage",
        "items",
        "skipped",
        "counts",
        "skipped_items",
    ]
    assert (stats["stage"], stats["items"], stats["skipped"]) == ("embed", 4, 2)
    assert stats["counts"] == {"animated": 1}
    assert read_json(tmp_path / "times/embed.json")["counts"] == {"cached": 3}
    assert stats["skipped_items"] == [
        {"item": "photos/broken.jpg", "reason": "truncated"},
        {"item": "photos/empty.png", "reason": "zero bytes"},
    ]
    line = (
        r"embed: 4 images, 2 skipped \(33\.3 % of 6\), [\d.]+ s, [\d.]+ images/s, "
        r"animated 1, cached 3\n"
    )
    assert re.fullmatch(line, capsys.readouterr().out)


def test_times_are_kept_beside_the_stats_which_have_none(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with StageRun("mask", stats_path=tmp_path / name / "stats/mask.json") as run:
            run.advance(3)
        assert read_json(tmp_path / name / "times/mask.json")["seconds"] >= 0
    first, second = (tmp_path / name / "stats/mask.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_what_a_stage_took_before_is_part_of_its_time_and_of_no_items(tmp_path: Path) -> None:
    stats = tmp_path / "stats/retrain.json"
    with StageRun("retrain", stats_path=stats, earlier_seconds=1000.0) as run:
        run.advance(3)
        sleep(0.01)
    assert 1000 < read_json(tmp_path / "times/retrain.json")["seconds"] < 2000
    rate = last_rate(stats)
    assert rate is not None
    assert rate > 1


def test_times_of_a_run_with_a_folder_of_its_own_are_kept_in_such_a_folder(tmp_path: Path) -> None:
    with StageRun("train", stats_path=tmp_path / "stats/plus-a/train.json") as run:
        run.count_in_run("cached")
    assert read_json(tmp_path / "times/plus-a/train.json")["counts"] == {"cached": 1}
    assert read_json(tmp_path / "stats/plus-a/train.json")["counts"] == {}


def test_a_run_without_items_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StageRun("mask", stats_path=tmp_path / "mask.json", total=0):
        pass
    stats = read_json(tmp_path / "mask.json")
    assert (stats["items"], stats["skipped"]) == (0, 0)
    assert capsys.readouterr().out.startswith("mask: 0 images, 0 skipped, ")


def test_every_skip_is_counted_but_the_list_is_bounded(tmp_path: Path) -> None:
    with StageRun("embed", stats_path=tmp_path / "embed.json") as run:
        for number in range(1500):
            run.skip(f"{number}.jpg", "not an image")
    stats = read_json(tmp_path / "embed.json")
    assert stats["skipped"] == 1500
    assert [entry["item"] for entry in stats["skipped_items"]] == [f"{n}.jpg" for n in range(1000)]


@pytest.mark.parametrize("error", [PipelineError, KeyboardInterrupt])
def test_a_failed_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    def fail() -> None:
        with StageRun("embed", stats_path=tmp_path / "embed.json") as run:
            run.advance()
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX locks")
def test_two_runs_of_a_stage_in_a_workspace_are_one_too_many(tmp_path: Path) -> None:
    stats_path = tmp_path / "embed.json"
    with StageRun("embed", stats_path=stats_path):
        with pytest.raises(PipelineError, match=f"^{stats_path}: another run is writing it"):
            StageRun("embed", stats_path=stats_path)
        with StageRun("mask", stats_path=tmp_path / "mask.json"):
            pass
    assert read_json(stats_path)["stage"] == "embed"


@pytest.mark.parametrize("error", [PipelineError, KeyboardInterrupt, OSError])
def test_after_a_failed_run_the_next_one_starts(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), StageRun("embed", stats_path=tmp_path / "embed.json"):
        raise error
    with StageRun("embed", stats_path=tmp_path / "embed.json"):
        pass


def test_after_counts_that_could_not_be_written_the_next_run_starts(tmp_path: Path) -> None:
    stats_path = tmp_path / "embed.json"
    with pytest.raises(IsADirectoryError), StageRun("embed", stats_path=stats_path):
        stats_path.mkdir()
    stats_path.rmdir()
    with StageRun("embed", stats_path=stats_path):
        pass


def test_the_same_seed_gives_the_same_draws() -> None:
    def draws(seed: int) -> list[float]:
        seed_generators(seed)
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    first = draws(3)
    assert draws(3) == first
    assert all(a != b for a, b in zip(draws(4), first, strict=True))
    assert make_runtime(device="cpu", seed=2**40).seed == 2**40


def test_the_cpu_computes_in_float32() -> None:
    runtime = make_runtime(device="cpu")
    assert (runtime.device, runtime.amp_dtype) == (torch.device("cpu"), None)
    with runtime.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_the_precision_can_be_chosen(precision: str, dtype: torch.dtype) -> None:
    with make_runtime(device="cpu", precision=precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_an_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(PipelineError, match="'half' is not one of auto, float32, bfloat16, float1"):
        make_runtime(device="cpu", precision="half")


def test_auto_takes_what_there_is() -> None:
    runtime = make_runtime(device="auto")
    assert runtime.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_number_of_threads_can_be_chosen() -> None:
    before = torch.get_num_threads()
    try:
        make_runtime(device="cpu", threads=3)
        assert torch.get_num_threads() == 3
        make_runtime(device="cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_in_bfloat16() -> None:
    runtime = make_runtime(device="cuda")
    ones = torch.ones(2, 2, device=runtime.device)
    with runtime.autocast():
        assert (ones @ ones).dtype == torch.bfloat16
    with make_runtime(device="cuda", precision="float32").autocast():
        assert (ones @ ones).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(PipelineError, match="no CUDA device was found; use auto"):
        make_runtime(device="cuda")


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(PipelineError, match="'tpu' is not one of auto, cpu, cuda"):
        make_runtime(device="tpu")


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PIPELINE_CACHE", raising=False)
    folders = [make_runtime().cache_dir]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folders.append(make_runtime().cache_dir)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "mine"))
    folders.append(make_runtime().cache_dir)
    monkeypatch.setenv("PIPELINE_CACHE", "")
    folders.append(make_runtime().cache_dir)
    assert folders == [
        tmp_path / "home" / ".cache" / "zutis-pipeline",
        tmp_path / "xdg" / "zutis-pipeline",
        tmp_path / "mine",
        tmp_path / "xdg" / "zutis-pipeline",
    ]


def test_counts_that_cannot_be_written_are_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        StageRun("embed", stats_path=tmp_path / "file" / "stats.json")


def test_too_many_errors_fail_a_run_with_the_worst_offenders(tmp_path: Path) -> None:
    def spoil(count: int, **limits: Any) -> None:
        with StageRun("mask", stats_path=tmp_path / "stats.json", total=400, **limits) as stage:
            for number in range(count):
                stage.skip(f"{number}.jpg", "truncated" if number % 4 else "not an image")
            stage.advance(400 - count)

    spoil(400)
    (tmp_path / "stats.json").unlink()
    spoil(20, max_error_rate=0.05)  # exactly the share that may be
    (tmp_path / "stats.json").unlink()
    with pytest.raises(PipelineError) as caught:
        spoil(40, max_error_rate=0.05)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(
        "mask: 21 of 400 images so far cannot be used, more than mask.max_error_rate"
    )
    assert lines[1:] == [
        "  15 truncated: 1.jpg, 2.jpg, 3.jpg",
        "  6 not an image: 0.jpg, 4.jpg, 8.jpg",
    ]
    assert not (tmp_path / "stats.json").exists()


def test_a_single_error_is_no_rate(tmp_path: Path) -> None:
    for count, fails in ((1, False), (2, True)):
        with (
            pytest.raises(PipelineError, match="a single one is always forgiven")
            if fails
            else nullcontext(),
            StageRun("mask", stats_path=tmp_path / "s.json", total=20, max_error_rate=0.0) as stage,
        ):
            for number in range(count):
                stage.skip(f"{number}.jpg", "truncated")


def test_the_gpu_of_a_mac_is_used_only_where_it_is_and_is_asked_for() -> None:
    if not torch.backends.mps.is_available():
        with pytest.raises(PipelineError, match=r"^params\.yaml: device: mps, but .*; use auto$"):
            make_runtime(device="mps")
    assert make_runtime(device="auto").device.type != "mps"
