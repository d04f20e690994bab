"""Stages on a Ray cluster of this machine: the bytes of a local run, also when workers die."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine.progress import Tally
from pipeline.engine.runtime import CACHE_VARIABLE, Runtime
from pipeline.engine.shard_run import Job, run_job
from pipeline.errors import PipelineError
from tests.stages.tiny_workspace import STAGES, Workspace, content, write_workspace

ray = pytest.importorskip("ray", reason="Ray is not installed")

from pipeline.engine.ray_executor import RayExecutor  # noqa: E402


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> Workspace:
    root = tmp_path_factory.mktemp("ray") / "world"
    return write_workspace(root, tiny_clip, index=45, bench=12)


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("worker_cache")))
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "180")  # other tests want the cores too
        yield RayExecutor(device="cpu", seed=0, workers=2)
        ray.shutdown()


@pytest.mark.parametrize("stage", STAGES)
def test_two_workers_make_the_bytes_of_a_local_run(
    workspace: Workspace, executor: RayExecutor, tmp_path: Path, stage: str
) -> None:
    local = workspace.run(stage, tmp_path / "local")
    spread = workspace.run(stage, tmp_path / "ray", executor=executor)
    assert content(spread) == content(local)
    counts = [json.loads((tmp_path / name / "stats.json").read_text()) for name in ("local", "ray")]
    assert counts[0]["items"] == counts[1]["items"] > 0


class Counter:
    """Writes how many items it was given; dies once at the item `deadly`, and reports `bad`."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, scratch: str, runtime: Runtime) -> None:
        del runtime
        self._scratch = scratch

    def make(self, items: Sequence[str], path: Path, tally: Tally) -> int:
        for item in items:
            marker = f"{self._scratch}/died"
            if item == "deadly" and not os.path.exists(marker):  # noqa: PTH110
                open(marker, "w").close()  # noqa: PTH123
                os.kill(os.getpid(), signal.SIGKILL)
            if item == "bad":
                tally.skip(item, "it is bad")
            else:
                tally.advance()
        path.write_text(" ".join(items))
        return tally.items

    def close(self) -> None:
        pass


class Precision:
    """Writes in which precision it was told to compute."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def make(self, items: Sequence[str], path: Path, tally: Tally) -> int:
        tally.advance(len(items))
        path.write_text(str(self._runtime.amp_dtype))
        return len(items)

    def close(self) -> None:
        pass


def test_workers_compute_in_the_precision_of_the_params(
    executor: RayExecutor, tmp_path: Path
) -> None:
    del executor  # it starts Ray with what the test session needs
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run_job(
        Job("tell", ["item"], shard_size=1, load=Precision),
        out_dir=tmp_path / "out",
        stats_path=tmp_path / "stats.json",
        runtime=Runtime(torch.device("cpu"), None, seed=0, cache_dir=tmp_path / "cache"),
        executor=RayExecutor(device="cpu", precision="float16", seed=0, workers=1),
    )
    (shard,) = (tmp_path / "out").glob("*.tar")
    assert shard.read_text() == "torch.float16"


def count(items: Sequence[str], out: Path, executor: RayExecutor, **limits: Any) -> dict[str, Any]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    stats = out.with_suffix(".json")
    job = Job("count", items, shard_size=4, load=partial(Counter, str(out.parent)), **limits)
    runtime = Runtime(torch.device("cpu"), None, seed=0, cache_dir=out.parent / "cache")
    run_job(job, out_dir=out, stats_path=stats, runtime=runtime, executor=executor)
    return json.loads(stats.read_text())


def test_shards_of_a_lost_worker_are_made_again(executor: RayExecutor, tmp_path: Path) -> None:
    items = [f"item{number}" for number in range(14)]
    items[6] = "deadly"
    stats = count(items, tmp_path / "out", executor)
    assert (tmp_path / "died").exists()
    assert (stats["items"], stats["skipped"]) == (14, 0)
    written = [path.read_text() for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert " ".join(written) == " ".join(items)


def test_errors_of_workers_are_those_of_the_stage(executor: RayExecutor, tmp_path: Path) -> None:
    items = ["fine", "bad"] * 20
    with pytest.raises(PipelineError, match=r"count\.max_error_rate: 0\.1 (?s:.)*it is bad"):
        count(items, tmp_path / "out", executor, max_error_rate=0.1)
    assert not (tmp_path / "out").exists()
    stats = count(items, tmp_path / "out", executor)
    assert (stats["items"], stats["skipped"]) == (20, 20)
