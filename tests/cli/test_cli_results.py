"""Names of results, so that none takes another's place; models and names of `predict`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipeline.benchmarks.voc import VocWriter
from pipeline.cli import app
from pipeline.errors import PipelineError
from tests.conftest import encoded_image, noise_image
from tests.stages.tiny_checkpoint import CATEGORIES, write_checkpoint

Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, tiny_clip: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Function that runs `pipeline ARGS` in a project with a benchmark and two checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    encoder = dict(zip(("model", "pretrained"), map(str, tiny_clip), strict=True))
    params = {
        "device": "cpu",
        "categories": CATEGORIES,
        "index": {"a": {"root": "a"}},
        "pseudo_label": {"encoder": encoder, "templates": "name"},
        "train": {"encoder": encoder},
        "evaluate": {"overlays": 0},
        "benches": {"tiny": {"format": "voc", "root": "voc", "categories": CATEGORIES}},
    }
    Path("params.yaml").write_text(json.dumps(params))
    writer = VocWriter(Path("voc"))
    labels = np.tile(np.arange(40) // 10, (32, 1)).astype(np.uint8)
    data = encoded_image(noise_image(3, 40, 32), "JPEG")
    writer.add("im", data, labels, labels)
    writer.write_split("val", ["im"])
    Path("photo.jpg").write_bytes(data)
    write_checkpoint(Path("models/zutis"), tiny_clip)

    def call(*args: str) -> None:
        done = CliRunner().invoke(app, args, catch_exceptions=False)
        assert done.exit_code == 0, done.output

    return call


def copy_encoder(tiny_clip: tuple[Path, Path], name: str) -> str:
    """The tiny CLIP under another name, as `--encoder` takes it."""
    folder = Path("weights")
    folder.mkdir(exist_ok=True)
    for source, suffix in zip(tiny_clip, (".json", ".safetensors"), strict=True):
        shutil.copy(source, folder / f"{name}{suffix}")
    return f"weights/{name}.json/weights/{name}.safetensors"


def copy_checkpoint(folder: str, **changes: object) -> str:
    shutil.copytree("models/zutis", folder)
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def results() -> set[str]:
    return {path.stem for path in Path("reports/metrics").glob("*.json")}


def protocol(name: str) -> list[str]:
    lines: list[str] = json.loads(Path(f"reports/metrics/{name}.json").read_text())["protocol"]
    return lines


def test_no_result_takes_the_place_of_another(run: Run, tiny_clip: tuple[Path, Path]) -> None:
    run("evaluate", "--bench", "tiny")
    assert results() == {"tiny"}
    own = Path("reports/metrics/tiny.json").read_bytes()
    encoder = copy_encoder(tiny_clip, "RN50")
    model, _, pretrained = encoder.partition(".json/")
    other_encoder = {"model": f"{model}.json", "pretrained": pretrained}
    voc = copy_checkpoint("best", categories=["cat", "dog"], encoder=other_encoder)
    again = copy_checkpoint("models/again")
    for name, args in (
        ("tiny_denseclip", ["--model", "denseclip"]),
        (
            "tiny_denseclip_RN50.json-RN50.safetensors",
            ["--model", "denseclip", "--encoder", encoder],
        ),
        (
            "tiny_denseclip_RN50.json-RN50.safetensors_spatter_2",
            ["--model", "denseclip", "--encoder", encoder, "--corruption", "spatter:2"],
        ),
        ("tiny_again", ["--checkpoint", again]),
        (
            "tiny_best_RN50.json-RN50.safetensors_2-names",
            ["--checkpoint", voc, "--open-vocabulary"],
        ),
    ):
        before = results()
        run("evaluate", "--bench", "tiny", *args)
        (new,) = results() - before
        assert new.startswith(name), new
        for path in ("overlays/{}", "plots/{}_confusion.csv", "stats/score-{}.json"):
            assert Path("reports", path.format(new)).exists()
        assert Path("data/predictions", new).is_dir()
    assert Path("reports/metrics/tiny.json").read_bytes() == own
    line = "encoder: RN50.json/RN50.safetensors"
    assert line in protocol("tiny_denseclip_RN50.json-RN50.safetensors")
    assert line not in protocol("tiny_denseclip")


def test_a_result_names_the_category_set_of_another_checkpoint(run: Run) -> None:
    characters = ["Batman", "Joker", "Mickey Mouse", "Donald Duck", "Mario", "Luigi"]
    copy_checkpoint("concepts", categories=characters)
    args = ("--bench", "tiny", "--checkpoint", "concepts", "--open-vocabulary")
    run("predict_bench", *args)
    run("score", *args)
    assert results() == {"tiny_concepts_concepts_characters"}
    shutil.rmtree("models/zutis")
    shutil.copytree("concepts", "models/zutis")
    run("evaluate", "--bench", "tiny", "--open-vocabulary")
    assert results() == {"tiny_concepts_concepts_characters", "tiny_concepts_characters"}
    shutil.rmtree("reports")
    copy_checkpoint("same", categories=CATEGORIES[::-1])
    run("evaluate", "--bench", "tiny", "--checkpoint", "same", "--open-vocabulary")
    assert results() == {"tiny_same"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--encoder", "RN50/openai"], "--encoder: RN50/openai: a checkpoint brings its own"),
        (["--model", "denseclip", "--encoder", "RN50"], "expected MODEL/TAG, such as RN50-quick"),
        (["--model", "denseclip", "--encoder", "/openai"], "expected MODEL/TAG"),
        (["--model", "maskclip"], "--model: 'maskclip' is unknown; choose one of"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "predict_bench", "score", "predict"])
def test_mistakes_about_models(run: Run, command: str, args: list[str], message: str) -> None:
    rest = ["photo.jpg", "--out", "out"] if command == "predict" else ["--bench", "tiny"]
    with pytest.raises(PipelineError) as caught:
        run(command, *rest, *args)
    assert message in str(caught.value)
    assert not Path("reports").exists()
    assert not Path("out").exists()


def predicted(*names: str) -> dict:
    content: dict = json.loads(Path("out/predictions.json").read_text())
    assert [item["name"] for item in content["categories"]] == list(names)
    return content


def test_photos_are_segmented_without_a_checkpoint(run: Run, tiny_clip: tuple[Path, Path]) -> None:
    shutil.rmtree("models")
    args = ("predict", "photo.jpg", "--out", "out", "--model", "denseclip")
    run(*args)
    assert predicted(*CATEGORIES)["annotations"]
    confidence = ("--confidence", "cat", "--confidence", "zebra")
    run(*args, "--categories", "cat,ox", "--context", "zebra", *confidence)
    (image,) = predicted("cat", "ox", "zebra")["images"]
    assert list(image["confidence"]) == ["cat", "zebra"]
    for name in ("overlay", "confidence"):
        paths = image[name].values() if name == "confidence" else [image[name]]
        assert all(Path("out", path).is_file() for path in paths)
    with Image.open(Path("out", image["confidence"]["zebra"])) as picture:
        assert picture.size == (40, 32)
        own = picture.tobytes()
    values = np.random.default_rng(0).permutation(16)
    encoder = copy_encoder(tiny_clip, "other")
    path = Path("weights/other.safetensors")
    tensors = load_file(path)
    tensors["visual.proj"] = tensors["visual.proj"][:, values].contiguous()
    save_file(tensors, path)
    run(*args, "--categories", "cat,ox", "--context", "zebra", *confidence, "--encoder", encoder)
    with Image.open(Path("out", image["confidence"]["zebra"])) as picture:
        assert picture.tobytes() != own
    with pytest.raises(PipelineError, match=r"'lion' is not among the names .*: cat, dog, bird"):
        run(*args, "--confidence", "lion")


@pytest.mark.parametrize("model", [["--model", "denseclip"], []])
def test_categories_may_be_a_set(run: Run, model: list[str]) -> None:
    args = ("predict", "photo.jpg", "--out", "out", *model, "--categories")
    run(*args, "concepts_celebrities", "--context", "concepts_sharpness")
    predicted("Bill Gates", "Steve Jobs", "blurry car", "sharp car")
    run(*args, '"voc"')  # quoted, a name like others
    predicted("voc")
    run(*args, "voc, cat")
    predicted("voc", "cat")
    with pytest.raises(PipelineError, match="no category set; did you mean concepts_sports"):
        run(*args, "concepts_sport")
