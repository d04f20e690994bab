"""`pipeline selfmask train`: from a folder of images to a network that the mask stage uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.methods.masks import SelfMaskParams, load_mask_source
from pipeline.methods.selfmask import SelfMaskTraining
from pipeline.models.masks.selfmask import SelfMaskConfig, ViTEncoder, load_selfmask
from pipeline.models.weights.weights import load_state
from pipeline.params.reading import parse_section

NETWORK = {
    **{"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
    **{"num_queries": 3, "decoder_layers": 1, "grid": 4},
}
Train = Callable[..., Path]


@pytest.fixture
def train(
    tmp_path: Path,
    tiny_clip: tuple[Path, Path],
    make_image_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Train:
    """Function that runs the command on seven images and two that cannot be read."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    folder = make_image_folder(count=7)
    (folder / "broken.jpg").write_bytes((folder / "3.jpg").read_bytes()[:300])
    (folder / "empty.png").touch()
    model, weights = map(str, tiny_clip)
    encoder = {"model": model, "pretrained": weights}
    votes = {"encoder": encoder, "more_encoders": [encoder], "max_error_rate": 0.3}
    small = {"network": NETWORK, "iterations": 3, "batch_size": 2, "crop_size": 16}

    def run(
        name: str = "one.safetensors", *words: str, images: Path = folder, **changes: Any
    ) -> Path:
        config = {"votes": votes | changes.pop("votes", {}), **small, **changes}
        (tmp_path / "config.yaml").write_text(json.dumps(config))
        options = {"images": images, "out": tmp_path / name, "config": tmp_path / "config.yaml"}
        options |= {"work": tmp_path / "work", "device": Path("cpu")}
        given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        done = CliRunner().invoke(app, ["selfmask", "train", *given, *words])
        if done.exception is not None:
            raise done.exception
        return tmp_path / name

    return run


def test_it_writes_a_network_that_the_mask_stage_uses(train: Train, runtime: Runtime) -> None:
    weights = train()
    assert load_selfmask(weights).config == SelfMaskConfig(**NETWORK)
    source = load_mask_source(SelfMaskParams(weights=weights), runtime)
    assert source.predict(torch.rand(1, 3, 20, 30)).shape == (1, 20, 30)


def test_the_same_command_gives_the_same_bytes_and_votes_once(train: Train, tmp_path: Path) -> None:
    first = train().read_bytes()
    assert json.loads((tmp_path / "work/masks.json").read_text())["counts"]["masked"] == 7
    for state in (tmp_path / "work").glob("state-*"):
        state.unlink()
    assert train("two.safetensors").read_bytes() == first
    assert json.loads((tmp_path / "work/masks.json").read_text())["counts"]["masked"] == 0
    assert train("seed.safetensors", "--seed", "5").read_bytes() != first
    assert train("longer.safetensors", iterations=4).read_bytes() != first
    assert len(list((tmp_path / "work").glob("state-*"))) == 3


def test_the_encoder_may_start_from_a_dino(train: Train, tmp_path: Path) -> None:
    state = ViTEncoder(SelfMaskConfig(**NETWORK)).state_dict()
    torch.save(state, tmp_path / "dino.pth")
    weights = train(initial=str(tmp_path / "dino.pth"), learning_rate=1e-9)
    found = load_state(weights)
    for name, value in state.items():
        torch.testing.assert_close(found[f"encoder.{name}"], value, atol=1e-6, rtol=0)


def test_mistakes_are_named_before_the_votes(train: Train, tmp_path: Path) -> None:
    for changes, message in (
        ({"network": {**NETWORK, "num_heads": 3}}, "network: num_heads 3 does not divide dim 16"),
        ({"initial": "nowhere.pth"}, "nowhere.pth"),
        ({"votes": {"weights": "a"}}, r"config\.yaml: unknown key 'votes\.weights'"),
        ({"images": tmp_path / "nowhere"}, r"--images\.root: .*nowhere: no such folder"),
    ):
        with pytest.raises(PipelineError, match=message):
            train(**changes)
    with pytest.raises(PipelineError, match=r"--out: .*/net\.pt: name a file that ends with"):
        train("net.pt")
    assert not (tmp_path / "work/masks").exists()


def test_too_many_images_that_cannot_be_read_name_the_params_of_the_votes(train: Train) -> None:
    with pytest.raises(PipelineError, match=r"votes\.max_error_rate: 0\.1"):
        train(votes={"max_error_rate": 0.1})


@pytest.mark.parametrize("changes", [{}, {"votes": {"max_error_rate": 0.5}}])
def test_the_default_is_the_recipe(changes: dict[str, Any]) -> None:
    """Three sources of features, votes at k = 2, 3 and 4; also if something else is set."""
    params = parse_section(changes, SelfMaskTraining, name="config")
    assert 1 + len(params.votes.more_encoders) == 3
    assert params.votes.clusters == [2, 3, 4]
    assert params.initial == ""
