"""Pre-training writes networks that the pipeline loads, and continues where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.demo.glyphs import KNOWN_FAMILIES, glyph_names, load_glyphs
from pipeline.demo.pretrain import pretrain
from pipeline.demo.pretrain_clip import PairBatches, Phase, model_config
from pipeline.demo.pretrain_selfmask import Schedule
from pipeline.engine.runtime import Runtime, make_runtime
from pipeline.errors import PipelineError
from pipeline.models.clip import load_clip
from pipeline.models.masks.selfmask import load_selfmask
from pipeline.params.base import EncoderParams

PHASES = (
    Phase(24, 2, 1e-3, singles_only=True),
    Phase(32, 2, 1e-3, singles_only=False, shapeless=0.5, patch_loss=1.0, background_loss=1.0),
)
SCHEDULE = Schedule(blocks=1, block_images=16, iterations=2, probe_images=2)


def run(folder: Path, work: Path, runtime: Runtime) -> dict[str, bytes]:
    pretrain(folder, work, runtime=runtime, phases=PHASES, probe_images=16, schedule=SCHEDULE)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_networks_and_card(tmp_path: Path) -> None:
    runtime = make_runtime(device="cpu", seed=3)
    first = run(tmp_path / "out", tmp_path / "work", runtime)
    assert sorted(first) == [
        "README.md",
        "accuracy.json",
        "accuracy_curve.json",
        "tiny_clip.json",
        "tiny_clip.safetensors",
        "tiny_selfmask.json",
        "tiny_selfmask.safetensors",
    ]
    assert all(len(data) < 8_000_000 for data in first.values())
    assert "--seed 3" in first["README.md"].decode()
    figures = {
        "known",
        "world",
        "unseen",
        "random_look",
        "random_look_unseen",
        "denseclip_miou",
    }
    assert set(json.loads(first["accuracy.json"])) == figures
    curve = json.loads(first["accuracy_curve.json"])
    assert [(point["iterations"], point["size"]) for point in curve] == [(2, 24), (4, 32)]
    assert all(set(point) == {"iterations", "size", *figures} for point in curve)

    encoder = load_clip(
        EncoderParams(
            model=str(tmp_path / "out/tiny_clip.json"),
            pretrained=str(tmp_path / "out/tiny_clip.safetensors"),
        ),
        runtime.device,
    )
    features = encoder.encode_texts(["a photo of a cat.", "the potted plant and tv"])
    assert features.shape == (2, 128)
    with pytest.raises(PipelineError, match="zebra"):
        encoder.encode_texts(["a photo of a zebra."])
    masks = load_selfmask(tmp_path / "out/tiny_selfmask.safetensors").saliency(
        torch.rand(1, 3, 40, 56)
    )
    assert masks.shape == (1, 40, 56)

    (tmp_path / "work/selfmask_card.json").unlink()
    again = run(tmp_path / "out", tmp_path / "work", runtime)
    assert again["tiny_selfmask.safetensors"] == first["tiny_selfmask.safetensors"]


def test_batches_are_a_function_of_seed_and_step() -> None:
    phase = Phase(24, 10, 1e-3, singles_only=False)
    batch = PairBatches(phase, seed=1, start=0)[5]
    resumed = PairBatches(phase, seed=1, start=5)[0]
    assert torch.equal(batch.images, resumed.images)
    assert (batch.captions, batch.phrases) == (resumed.captions, resumed.phrases)
    for caption, topic in zip(batch.captions, batch.topics, strict=True):
        assert all(name in caption for name in topic.split(", "))
    other = PairBatches(phase, seed=2, start=0)[5]
    assert not torch.equal(batch.images, other.images)


def test_every_category_can_be_drawn_and_said() -> None:
    categories, others = glyph_names()
    assert set(categories + others) <= set(load_glyphs(KNOWN_FAMILIES))
    assert model_config(96)["text_cfg"]["vocab_size"] == len(model_config(96)["vocabulary"])
