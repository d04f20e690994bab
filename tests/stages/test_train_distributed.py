"""Processes that share every batch train what one process trains."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from pipeline.engine.distributed import Group
from pipeline.errors import PipelineError
from pipeline.methods.students import TrainParams
from pipeline.models.weights.weights import load_state
from pipeline.params.base import EncoderParams
from tests.processes import Fork, run_pipeline
from tests.stages.tiny_training import (
    curve,
    run,
    small_params,
    states,
    train_words,
    version,
    write_labels,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def labels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels") / "labels")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(root: Path) -> torch.Tensor:
    """All trained weights in one row."""
    state = load_state(root / "zutis/model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def assert_same_training(root: Path, other: Path, start: Path) -> None:
    """The curves agree, and so do the weights, measured by what training has moved."""
    for name in ("loss", "semantic", "mask", "learning_rate"):
        steps, values = zip(*curve(root, name), strict=True)
        other_steps, other_values = zip(*curve(other, name), strict=True)
        assert steps == other_steps
        assert values == pytest.approx(other_values, rel=1e-4), name
    moved = weights(other) - weights(start)
    assert (weights(root) - weights(other)).norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("matching", ["pixels", "points"])
def test_accumulated_gradients_train_as_one_batch(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path, reduction: str, matching: str
) -> None:
    roots = [
        run(
            labels_dir,
            tmp_path / str(number),
            small_params(
                encoder,
                batch_size=4,
                accumulate=accumulate,
                iterations=iterations,
                mask_loss_reduction=reduction,
                matching=matching,
            ),
        )
        for number, (accumulate, iterations) in enumerate([(2, 4), (4, 4), (1, 4), (1, 1)])
    ]
    for root in roots[:2]:
        assert_same_training(root, roots[2], roots[3])


def start_two(labels_dir: Path, root: Path, params: TrainParams) -> Fork:
    """What `torchrun` does for two processes, which it restarts once."""
    words = train_words(labels_dir, root, params)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="two",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="fork",
    )

    def work() -> None:
        run_pipeline(*words, cwd=root, PIPELINE_CACHE=root / "cache")

    return Fork(lambda: launch_agent(config, work, []))


def test_two_processes_train_as_one_and_survive_the_death_of_one(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    settings = {"batch_size": 4, "mask_loss_reduction": "mean", "workers": 1}
    params = small_params(encoder, iterations=16, log_every=3, checkpoint_every=4, **settings)
    one = run(labels_dir, tmp_path / "one", params)
    first = run(labels_dir, tmp_path / "first", small_params(encoder, iterations=1, **settings))
    root = tmp_path / "two"
    params = params.model_copy(update={"accumulate": 2})

    process = start_two(labels_dir, root, params)
    process.wait_until(lambda: version(root) != [])
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    for killed in [ranks[-1], *ranks[-1].children()]:
        killed.kill()
    code, output = process.wait(), process.output()
    assert code == 0, output
    assert output.count("train: resumed at step ") == 1
    assert output.count(" iterations, 0 skipped") == 1
    assert_same_training(root, one, first)
    assert states(root) == []


@pytest.mark.parametrize(
    ("accumulate", "size", "message"),
    [
        (3, 1, r"train\.batch_size: 8 .* train\.accumulate 3; choose a multiple of 3"),
        (1, 3, r"train\.batch_size: 8 .* train\.accumulate 1 x 3 processes.* multiple of 3"),
        (4, 4, r"train\.batch_size: 8 .* train\.accumulate 4 x 4 processes.* multiple of 16"),
    ],
)
def test_a_batch_that_cannot_be_dealt_out_evenly_is_refused(
    labels_dir: Path,
    encoder: EncoderParams,
    tmp_path: Path,
    accumulate: int,
    size: int,
    message: str,
) -> None:
    params = small_params(encoder, batch_size=8, accumulate=accumulate)
    with pytest.raises(PipelineError, match=message):
        run(labels_dir, tmp_path, params, group=Group(CPU, rank=0, size=size))
    assert list(tmp_path.iterdir()) == []
