from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.images import decode_label, decode_png, encode_jpeg, encode_png, load_image
from pipeline.formats.shards import read_manifest
from pipeline.methods.dense import DenseClipParams, load_dense_labeller
from pipeline.params.base import EncoderParams
from pipeline.stages import pseudo_label
from pipeline.vocabulary.categories import Names
from tests.formats.shard_folders import read_shards, write_shards

CATEGORIES = ["cat", "dog"]
SIZES = [(24, 16), (16, 24), (24, 16), (17, 9)]
CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def encoder_params(tmp_path: Path) -> EncoderParams:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.CLIP(**CONFIG).state_dict()
    save_file(state, tmp_path / "clip.safetensors")
    (tmp_path / "clip.json").write_text(json.dumps(CONFIG))
    return EncoderParams(
        model=str(tmp_path / "clip.json"), pretrained=str(tmp_path / "clip.safetensors")
    )


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=tmp_path / "cache")


@pytest.fixture
def mask_dir(tmp_path: Path) -> Path:
    """Four images in three archives (0: negatives); the first and third are the same photo."""
    write_masks(tmp_path / "masks", [("cat", 1), ("dog", 2), ("dog", 2), ("background", 0)])
    return tmp_path / "masks"


def write_masks(out_dir: Path, archives: list[tuple[str, int]]) -> None:
    write_shards(
        (_sample(index, *archive) for index, archive in enumerate(archives)),
        out_dir,
        shard_size=3,
    )


def _sample(index: int, category: str, label_id: int) -> dict[str, Any]:
    width, height = SIZES[index]
    rng = np.random.default_rng(index % 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {
        "__key__": f"{index:020d}_{label_id}",
        "jpg": encode_jpeg(Image.fromarray(pixels)),
        "mask.png": encode_png(pixels[..., 0] > 128),
        "json": {"category": category, "label_id": label_id, "rank": 1, "similarity": 0.25},
    }


def run(
    mask_dir: Path,
    runtime: Runtime,
    encoder: EncoderParams,
    *,
    name: str = "labels",
    categories: list[str] = CATEGORIES,
    **params: Any,
) -> tuple[Path, dict[str, Any]]:
    """Run the stage; return its output folder and its stats."""
    out_dir, stats_path = mask_dir.parent / name, mask_dir.parent / f"{name}.json"
    pseudo_label.run(
        mask_dir=mask_dir,
        out_dir=out_dir,
        categories=categories,
        background=["background"],
        params=DenseClipParams(encoder=encoder, shard_size=3, **params),
        runtime=runtime,
        stats_path=stats_path,
    )
    return out_dir, json.loads(stats_path.read_text())


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_every_sample_gets_labels_of_denseclip(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    out_dir, stats = run(mask_dir, runtime, encoder_params, batch_size=2)
    before, after = list(read_shards(mask_dir)), list(read_shards(out_dir))
    assert [path.name for path in sorted(out_dir.glob("*.tar"))] == ["00000.tar", "00001.tar"]
    assert (stats["items"], stats["skipped"], stats["counts"]) == (4, 0, {"cached": 0})
    model = load_dense_labeller(DenseClipParams(encoder=encoder_params), Names(CATEGORIES), runtime)
    seen = set()
    for old, new in zip(before, after, strict=True):
        assert new.keys() == {"__key__", "label.png", "confidence.png"}
        assert new["__key__"] == old["__key__"]
        image = load_image(old["jpg"])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        expected, confidence = model.label(pixels)
        label = decode_label(new["label.png"])
        assert label.tolist() == expected[0].tolist()
        levels = decode_png(new["confidence.png"])
        assert levels.dtype == np.uint8
        assert levels.shape == label.shape == (image.height, image.width)
        assert np.abs(levels / 255 - confidence[0].numpy()).max() < 0.5 / 255 + 1e-5
        seen |= set(label.flatten().tolist())
    assert len(seen) > 1
    assert after[0]["label.png"] == after[2]["label.png"]


def test_the_same_input_gives_the_same_bytes_cold_and_cached(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams, tmp_path: Path
) -> None:
    first, _ = run(mask_dir, runtime, encoder_params)
    expected = content(first)
    again, stats = run(mask_dir, runtime, encoder_params)
    assert content(again) == expected
    assert stats["counts"]["cached"] == 4
    elsewhere = Runtime(runtime.device, runtime.amp_dtype, 0, tmp_path / "empty")
    cold, stats = run(mask_dir, elsewhere, encoder_params, name="cold")
    assert content(cold) == expected
    assert stats["counts"]["cached"] == 0


def test_only_new_images_are_computed_and_all_of_them_under_new_settings(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    write_masks(mask_dir, [("cat", 1), ("dog", 2)])
    run(mask_dir, runtime, encoder_params)
    write_masks(mask_dir, [("cat", 1), ("dog", 2), ("dog", 2), ("background", 0)])
    _, stats = run(mask_dir, runtime, encoder_params)
    assert stats["counts"]["cached"] == 3
    for changes in ({"prompt_denoising": 0.5}, {"templates": "name"}, {"logit_scale": 20.0}):
        _, stats = run(mask_dir, runtime, encoder_params, **changes)
        assert stats["counts"]["cached"] == 0
    _, stats = run(mask_dir, runtime, encoder_params, categories=["cat", "dog", "cow"])
    assert stats["counts"]["cached"] == 0


def test_the_manifest_carries_the_protocol(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    out_dir, _ = run(mask_dir, runtime, encoder_params, key_smoothing=1.0)
    protocol = read_manifest(out_dir)["pseudo_label"]
    assert protocol["categories"] == CATEGORIES
    assert protocol["background"] == ["background"]
    assert protocol["key_smoothing"] == 1.0
    assert protocol["precision"] == "float32"
    assert len(protocol["weights"]) == 64


def test_more_than_254_categories_are_stored_in_16_bits(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    names = [*CATEGORIES, *(f"thing {index}" for index in range(300))]
    out_dir, _ = run(mask_dir, runtime, encoder_params, categories=names, templates="name")
    sample = next(read_shards(out_dir))
    with Image.open(io.BytesIO(sample["label.png"])) as image:
        assert image.mode.startswith("I")
    assert decode_label(sample["label.png"]).shape == (16, 24)


@pytest.mark.parametrize("categories", [["dog", "cat"], ["cat"]])
def test_masks_of_another_category_list_are_refused(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams, categories: list[str]
) -> None:
    out_dir, _ = run(mask_dir, runtime, encoder_params)
    expected = content(out_dir)
    (mask_dir.parent / "labels.json").unlink()
    with pytest.raises(PipelineError, match=r"categories: .*'(cat|dog)' with label id"):
        run(mask_dir, runtime, encoder_params, categories=categories)
    assert content(out_dir) == expected
    assert not (mask_dir.parent / "labels.json").exists()


def test_no_samples_is_an_error(
    tmp_path: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    write_shards([], tmp_path / "masks", shard_size=3)
    with pytest.raises(PipelineError, match="masks: no samples"):
        run(tmp_path / "masks", runtime, encoder_params)


def test_a_damaged_shard_is_an_error_that_names_it(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    shard = mask_dir / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(PipelineError, match=r"00001\.tar"):
        run(mask_dir, runtime, encoder_params)


@pytest.mark.parametrize(
    ("size", "before", "change"),
    [
        ((16, 24), {"key_smoothing": 1.0}, {"key_affinity": "cosine"}),
        ((8, 32), {}, {"position_resize": "grid"}),  # 1 x 4 patches, as many as the native 2 x 2
    ],
)
def test_published_slips_have_a_param(
    encoder_params: EncoderParams,
    runtime: Runtime,
    size: tuple[int, int],
    before: dict[str, Any],
    change: dict[str, Any],
) -> None:
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    published, changed = (
        load_dense_labeller(
            DenseClipParams(encoder=encoder_params, **settings), Names(CATEGORIES), runtime
        ).scores(images)
        for settings in (before, before | change)
    )
    assert not torch.allclose(published, changed, atol=1e-4)


def test_the_number_of_workers_does_not_show(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams, tmp_path: Path
) -> None:
    outputs = []
    for workers in (0, 3):
        alone = Runtime(runtime.device, runtime.amp_dtype, 0, tmp_path / f"cache{workers}")
        out_dir, _ = run(mask_dir, alone, encoder_params, name=f"with{workers}", workers=workers)
        outputs.append(content(out_dir))
    assert outputs[0] == outputs[1]


def test_the_share_of_masks_that_is_labelled_as_their_category_is_in_the_stats(
    mask_dir: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    out_dir, stats = run(mask_dir, runtime, encoder_params)
    shares: dict[str, list[float]] = {"cat": [], "dog": []}
    for sample, labelled in zip(read_shards(mask_dir), read_shards(out_dir), strict=True):
        fields = json.loads(sample["json"])
        if fields["label_id"]:
            inside = decode_png(sample["mask.png"]) > 0
            hits = decode_label(labelled["label.png"])[inside] == fields["label_id"]
            shares[fields["category"]].append(float(hits.mean()))
    assert {name: entry["agreement"] for name, entry in stats["categories"].items()} == {
        name: pytest.approx(np.mean(values), abs=1e-4) for name, values in shares.items()
    }
    assert [stats["categories"][name]["images"] for name in ("cat", "dog")] == [1, 2]


def test_an_empty_mask_agrees_with_nothing_and_one_of_another_size_is_named(
    tmp_path: Path, runtime: Runtime, encoder_params: EncoderParams
) -> None:
    samples = [_sample(number, "cat", 1) for number in range(2)]
    samples[0]["mask.png"] = encode_png(np.zeros((16, 24), dtype=bool))
    write_shards(samples, tmp_path / "masks", shard_size=3)
    _, stats = run(tmp_path / "masks", runtime, encoder_params)
    assert stats["categories"]["cat"]["images"] == 1
    samples[0]["mask.png"] = encode_png(np.ones((5, 6), dtype=bool))
    write_shards(samples, tmp_path / "other", shard_size=3)
    with pytest.raises(PipelineError, match=r"mask cannot be used.*run `pipeline mask` again"):
        run(tmp_path / "other", runtime, encoder_params, name="again")
