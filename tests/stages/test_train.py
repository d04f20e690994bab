from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.corrections import CorrectedObject, Correction, write_corrections
from pipeline.formats.rle import encode_mask
from pipeline.inference.segmenter import Segmenter
from pipeline.models.clip import load_clip
from pipeline.models.weights.weights import load_state, load_strict
from pipeline.models.zutis.build import build_zutis
from pipeline.params.base import EncoderParams, TaggedFile
from tests.stages.tiny_training import CATEGORIES, curve, outputs, run, small_params, write_labels


@pytest.fixture(scope="module")
def labels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labels(tmp_path_factory.mktemp("labels") / "labels")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_corrected_images_are_trained_on_and_none_leaves_the_same_bytes(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    params = small_params(encoder)
    mask = np.zeros((40, 36), dtype=bool)
    mask[5:30, 5:30] = True
    objects = [CorrectedObject(name, encode_mask(mask)) for name in CATEGORIES[:1]]
    truths = [Correction(f"{number:064d}", "x", mask.shape, objects) for number in range(8)]
    write_corrections(tmp_path / "none", [])
    write_corrections(tmp_path / "some", truths)
    write_corrections(tmp_path / "elsewhere", [Correction("f" * 64, "x", (1, 1))])
    roots = {
        name: run(labels_dir, tmp_path / f"run-{name}", params, corrections_dir=tmp_path / name)
        for name in ("none", "some", "elsewhere", "missing")
    }
    plain = run(labels_dir, tmp_path / "plain", params)
    for name in ("none", "missing"):
        assert outputs(roots[name]) == outputs(plain)
        assert (roots[name] / "stats.json").read_bytes() == (plain / "stats.json").read_bytes()
    assert outputs(roots["elsewhere"]) == outputs(plain)
    stats = json.loads((roots["some"] / "stats.json").read_text())
    assert stats["counts"]["corrected"] == 8
    assert stats["warnings"] == ["no image shows dog: training cannot learn them"]
    assert outputs(roots["some"]) != outputs(plain)


def test_writes_checkpoint_curves_and_stats(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    params = small_params(encoder)
    root = run(labels_dir, tmp_path / "a", params)

    config = json.loads((root / "zutis/config.json").read_text())
    assert config["categories"] == CATEGORIES
    assert config["background"] == ["background", "grass"]
    assert config["step"] == 3
    assert config["templates"] == "name"
    assert config["logit_scale"] == 1.0
    assert config["train"] == params.model_dump(mode="json")
    clip = load_clip(EncoderParams(**config["encoder"]), torch.device("cpu"))
    before = clip.visual.proj.clone()
    model = build_zutis(clip.visual, **config["architecture"])
    load_strict(model, load_state(root / "zutis/model.safetensors"), root)
    assert not torch.equal(model.encoder.proj, before)

    assert [step for step, _ in curve(root, "loss")] == [2, 3]
    parts = zip(curve(root, "loss"), curve(root, "semantic"), curve(root, "mask"), strict=True)
    for (_, total), (_, semantic), (_, mask) in parts:
        assert total == pytest.approx(semantic + mask, rel=1e-5)
    rate = 1e-3 * (1 / 3) ** 0.9
    assert curve(root, "learning_rate")[-1][1] == pytest.approx(rate)
    summary = json.loads((root / "live/metrics.json").read_text())
    assert summary["train"]["loss"] == curve(root, "loss")[-1][1]
    assert sorted(path.name for path in (root / "live").iterdir()) == ["metrics.json", "plots"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]

    stats = json.loads((root / "stats.json").read_text())
    assert stats["items"] == 3
    assert stats["counts"] == {"archive_images": 8, "empty_masks": 0, "negatives": 1}


def test_categories_without_an_object_are_named_at_once_and_at_the_end(
    labels_dir: Path,
    encoder: EncoderParams,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    categories = ["cat", "dog", "bird", "red car"]
    params = small_params(encoder, target="saliency")
    root = run(labels_dir, tmp_path, params, categories=categories)
    warning = "no image shows bird, red car: training cannot learn them"
    assert json.loads((root / "stats.json").read_text())["warnings"] == [warning]
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"train: warning: {warning}"
    assert last.endswith(f"; warning: {warning}")


def test_checkpoint_predicts_with_any_names(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(labels_dir, tmp_path, small_params(encoder))
    segmenter = Segmenter.load(root / "zutis", categories=["horse", "cat", "car"], device="cpu")
    semantic = segmenter(Image.new("RGB", (40, 24))).semantic
    assert semantic.shape == (24, 40)
    assert set(np.unique(semantic)) <= {0, 1, 2, 3}


def test_bfloat16_trains_float32_weights(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, seed=5, cache_dir=tmp_path)
    low = run(labels_dir, tmp_path / "low", small_params(encoder), runtime=runtime)
    full = run(labels_dir, tmp_path / "full", small_params(encoder))
    state = load_state(low / "zutis/model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    losses = [dict(curve(root, "loss"))[2] for root in (low, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_float16_is_refused_at_once(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    runtime = Runtime(torch.device("cpu"), torch.float16, seed=5, cache_dir=tmp_path / "cache")
    with pytest.raises(PipelineError, match=r"^precision: float16 .* use bfloat16 or float32"):
        run(labels_dir, tmp_path / "out", small_params(encoder), runtime=runtime)
    assert not (tmp_path / "out/zutis").exists()


def test_same_bytes_whatever_the_workers(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    roots = [
        run(labels_dir, tmp_path / str(workers), small_params(encoder, workers=workers))
        for workers in (0, 2)
    ]
    weights = [(root / "zutis/model.safetensors").read_bytes() for root in roots]
    assert weights[0] == weights[1]
    assert curve(roots[0], "loss") == curve(roots[1], "loss")
    other = Runtime(torch.device("cpu"), None, seed=6, cache_dir=tmp_path)
    root = run(labels_dir, tmp_path / "seed", small_params(encoder), runtime=other)
    assert (root / "zutis/model.safetensors").read_bytes() != weights[0]


def test_the_loss_falls(labels_dir: Path, encoder: EncoderParams, tmp_path: Path) -> None:
    params = small_params(
        encoder, iterations=60, batch_size=4, log_every=10, logit_scale=10.0, colour_jitter=0.0
    )
    root = run(labels_dir, tmp_path, params)
    for name in ("semantic", "mask"):
        values = [value for _, value in curve(root, name)]
        assert values[-1] < 0.8 * values[0], name


def test_stop_gradient_and_weights_decide_what_is_trained(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    start = load_clip(encoder, torch.device("cpu")).visual.proj
    moved = {}
    for stop_gradient in (True, False):
        params = small_params(encoder, ce_weight=0.0, stop_gradient=stop_gradient)
        # Decay shrinks every weight; off, only gradients move them.
        params = params.model_copy(update={"weight_decay": 0.0})
        root = run(labels_dir, tmp_path / str(stop_gradient), params)
        state = load_state(root / "zutis/model.safetensors")
        key = "encoder.transformer.resblocks.0.mlp.c_fc.weight"
        clip = load_clip(encoder, torch.device("cpu"))
        moved[stop_gradient] = not torch.equal(
            state[key], clip.visual.state_dict()[key.removeprefix("encoder.")]
        )
        assert torch.equal(state["encoder.proj"], start)
    assert moved == {True: False, False: True}


def test_refuses_a_crop_below_one_patch(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=r"train\.crop_size: 7 .*8 pixels"):
        run(labels_dir, tmp_path, small_params(encoder, crop_size=7))
    assert list(tmp_path.iterdir()) == []


def test_missing_labels_are_named_before_the_bar_starts(
    labels_dir: Path,
    encoder: EncoderParams,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = small_params(encoder, target="denseclip")
    with pytest.raises(PipelineError, match=r"nowhere/_manifest\.json.*train\.labels"):
        run(labels_dir, tmp_path, params, labels_dir=tmp_path / "nowhere")
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


def test_refuses_other_categories(labels_dir: Path, encoder: EncoderParams, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"'cat', label id 1.*'dog'"):
        run(labels_dir, tmp_path, small_params(encoder), categories=["dog", "cat"])
    assert list(tmp_path.iterdir()) == []


def test_logging_leaves_git_and_dvc_alone(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    git("init", "--quiet")
    with pytest.raises(PipelineError, match="make a first commit"):
        run(labels_dir, tmp_path / "a", small_params(encoder))
    git("commit", "--quiet", "--allow-empty", "--message", "start")
    head = git("rev-parse", "HEAD")
    root = run(labels_dir, tmp_path / "a", small_params(encoder))
    assert (root / "live/metrics.json").is_file()
    assert git("rev-parse", "HEAD") == head
    assert git("for-each-ref", "--format=%(objectname)") == head
    assert git("status", "--porcelain") == "?? a/"


def test_divergence_names_the_step_and_keeps_no_checkpoint(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    params = small_params(encoder, learning_rate=1e30, encoder_learning_rate=1e30, iterations=6)
    with pytest.raises(PipelineError, match=r"step \d+.*diverged"):
        run(labels_dir, tmp_path, params)
    assert not (tmp_path / "zutis").exists()
    assert not (tmp_path / "stats.json").exists()


def test_a_checkpoint_that_cannot_be_written_is_known_before_training(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    (tmp_path / "zutis").write_text("a file")
    with pytest.raises(NotADirectoryError):
        run(labels_dir, tmp_path, small_params(encoder))
    assert [path.name for path in tmp_path.iterdir()] == ["zutis"]


VARIANT: dict[str, Any] = {
    "normalisation": "clip",
    "position_resize": "grid",
    "token_norm": "token",
}


def test_a_checkpoint_stores_the_variant_it_needs(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(labels_dir, tmp_path, small_params(encoder, **VARIANT))
    stored = json.loads((root / "zutis/config.json").read_text())["architecture"]
    clip = load_clip(encoder, torch.device("cpu"))
    assert stored["mean"] == clip.mean.flatten().tolist()
    assert stored["std"] == clip.std.flatten().tolist()
    right = tokens_under(root, stored, encoder)
    for names in (("mean", "std"), ("position_resize",), ("token_norm",)):
        without = {name: value for name, value in stored.items() if name not in names}
        assert not torch.allclose(tokens_under(root, without, encoder), right, atol=1e-4), names


def test_a_checkpoint_that_names_no_variant_is_the_published_one(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    root = run(labels_dir, tmp_path, small_params(encoder))
    path = root / "zutis/config.json"
    config = json.loads(path.read_text())
    right = tokens_under(root, config["architecture"], encoder)
    for name in ("mean", "std", "position_resize", "token_norm"):
        del config["architecture"][name]
    assert torch.equal(tokens_under(root, config["architecture"], encoder), right)
    path.write_text(json.dumps(config))
    assert Segmenter.load(root / "zutis", device="cpu").categories == CATEGORIES


def tokens_under(root: Path, architecture: dict[str, Any], encoder: EncoderParams) -> torch.Tensor:
    """Embeddings of the trained weights in a network of some architecture."""
    clip = load_clip(encoder, torch.device("cpu"))
    model = build_zutis(clip.visual, **architecture).eval()
    load_strict(model, load_state(root / "zutis/model.safetensors"), root)
    images = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images).patch_tokens


@pytest.mark.parametrize("name", VARIANT)
def test_each_variant_changes_what_is_trained(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path, name: str
) -> None:
    plain = run(labels_dir, tmp_path / "plain", small_params(encoder, iterations=1))
    params = small_params(encoder, iterations=1, **{name: VARIANT[name]})
    root = run(labels_dir, tmp_path / "variant", params)
    assert curve(root, "semantic") != curve(plain, "semantic")


def test_the_mask_losses_are_summed_or_averaged(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path
) -> None:
    losses = {}
    for reduction in ("sum", "mean"):
        params = small_params(encoder, iterations=1, mask_loss_reduction=reduction)
        root = run(labels_dir, tmp_path / reduction, params)
        [(_, losses[reduction])] = curve(root, "mask")
    # Two layers, two images and two or more objects: at least two pairs an image.
    assert losses["sum"] > 1.9 * losses["mean"] > 0


@pytest.mark.parametrize("matching", ["points", "tokens"])
def test_a_short_cut_of_the_matching_still_trains(
    labels_dir: Path, encoder: EncoderParams, tmp_path: Path, matching: str
) -> None:
    """The losses of matched pairs are at every pixel, so the first ones are near each other."""
    losses = {}
    for name in ("pixels", matching):
        params = small_params(encoder, iterations=1, matching=name)
        [(_, losses[name])] = curve(run(labels_dir, tmp_path / name, params), "mask")
    assert losses[matching] == pytest.approx(losses["pixels"], rel=0.05)
    assert losses[matching] >= 0.99 * losses["pixels"]


def test_a_checkpoint_keeps_the_tag_of_a_weights_file(
    labels_dir: Path,
    tiny_clip: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "Tiny.json").write_bytes(tiny_clip[0].read_bytes())
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path / "configs"])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.add_model_config(tmp_path / "configs")
    half = {"file": str(tiny_clip[1]), "mean": (0.5, 0.5, 0.5), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"half": half})
    architectures, predictions = [], []
    for name, pretrained in [
        ("by_tag", "half"),
        ("by_path", TaggedFile(tag="half", file=str(tiny_clip[1]))),
    ]:
        encoder = EncoderParams(model="Tiny", pretrained=pretrained)
        root = run(labels_dir, tmp_path / name, small_params(encoder, normalisation="clip"))
        config = json.loads((root / "zutis/config.json").read_text())
        assert config["encoder"] == encoder.model_dump()
        architectures.append(config["architecture"])
        segmenter = Segmenter.load(root / "zutis", device="cpu")
        predictions.append(segmenter(np.full((40, 48, 3), 90, dtype=np.uint8)).semantic)
    assert architectures[0]["mean"] == [0.5, 0.5, 0.5]
    assert architectures[0] == architectures[1]
    np.testing.assert_array_equal(*predictions)
