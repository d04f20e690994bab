"""Stage mask: what is in the shards, what is skipped, what a second run re-uses."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from pipeline.engine.runtime import Runtime
from pipeline.errors import PipelineError
from pipeline.formats.images import decode_png, load_image
from pipeline.formats.objects import decode_objects, encode_objects
from pipeline.formats.sources import sample_key
from pipeline.formats.tables import ArchiveRow, write_archives
from pipeline.methods.masks import (
    MASK_SOURCES,
    MaskMethod,
    MaskParams,
    SelfMaskParams,
    SpectralParams,
    load_mask_source,
)
from pipeline.models.masks.bilateral import bilateral_solve
from pipeline.models.masks.features import FeatureEncoder
from pipeline.models.masks.making import coarse_masks, refine_mask
from pipeline.models.masks.selfmask import SelfMask, SelfMaskConfig, load_selfmask, save_selfmask
from pipeline.models.masks.spectral import spectral_mask
from pipeline.params.base import EncoderParams
from pipeline.stages import mask
from tests.formats.shard_folders import read_shards

MEMBERS = ("jpg", "mask.png", "json")
ORIENTATION = 0x0112
CLIP_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def photo(width: int, height: int, seed: int) -> Image.Image:
    """A bright disc on a noisy ground."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 80, (height, width, 3), np.uint8))
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.integers(150, 256, 3).tolist()))
    return image


def file_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_jpeg() -> bytes:
    image = photo(48, 32, 3)
    exif = image.getexif()
    exif[ORIENTATION] = 6
    return file_bytes(image, "JPEG", exif=exif, quality=90)


def six_files() -> dict[str, bytes]:
    plain = file_bytes(photo(48, 32, 0), "JPEG", quality=90)
    return {
        "a.jpg": plain,
        "b.jpg": plain[: len(plain) // 2],
        "c.png": file_bytes(photo(40, 40, 1).convert("RGBA"), "PNG"),
        "d.jpg": plain,
        "e.jpg": rotated_jpeg(),
        "f.jpg": file_bytes(photo(200, 90, 4), "JPEG", quality=90),
    }


def archive_row(folder: Path, name: str, data: bytes, *, rank: int, label_id: int) -> ArchiveRow:
    (folder / name).write_bytes(data)
    return ArchiveRow(
        category=f"category {label_id}",
        label_id=label_id,
        rank=rank,
        key=sample_key("folder", name),
        similarity=0.5 - rank / 64,
        source="folder",
        path=(folder / name).as_posix(),
        member=None,
        offset=None,
        width=48,
        height=32,
        sha256=hashlib.sha256(data).hexdigest(),
    )


class World:
    """Six images, one truncated and one a copy, in two archives; a tiny SelfMask."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "images").mkdir()
        self.rows = [
            archive_row(root / "images", name, data, rank=rank % 3 + 1, label_id=rank // 3 + 1)
            for rank, (name, data) in enumerate(six_files().items())
        ]
        torch.manual_seed(0)
        config = SelfMaskConfig(
            dim=16, depth=1, num_heads=2, num_queries=3, decoder_layers=1, mlp_ratio=2, grid=4
        )
        save_selfmask(SelfMask(config), root / "selfmask.safetensors")
        self.params: MaskParams = SelfMaskParams(
            weights=root / "selfmask.safetensors",
            short_side=60,
            batch_size=2,
            shard_size=3,
            max_error_rate=1,
        )
        self.runtime = Runtime(
            device=torch.device("cpu"), amp_dtype=None, seed=0, cache_dir=root / "cache"
        )

    def run(self, out: str = "masks", **changes: Any) -> dict[str, Any]:
        write_archives(self.root / "archives.parquet", self.rows)
        return mask.run(
            archives_path=self.root / "archives.parquet",
            out_dir=self.root / out,
            params=self.params.model_copy(update=changes),
            runtime=self.runtime,
            stats_path=self.root / f"{out}.stats.json",
        )

    def stats(self, out: str = "masks") -> dict[str, Any]:
        return json.loads((self.root / f"{out}.stats.json").read_text())

    def samples(self, out: str = "masks") -> dict[str, dict[str, Any]]:
        """Sample by file name of its image."""
        samples = {}
        for sample in read_shards(self.root / out, members=MEMBERS):
            sample["json"] = json.loads(sample["json"])
            samples[Path(sample["json"]["path"]).name] = sample
        return samples


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_second_run_gives_the_same_bytes_from_the_cache(world: World) -> None:
    world.run("first")
    world.run("second")
    assert contents(world.root / "first") == contents(world.root / "second")
    first, second = world.stats("first")["counts"], world.stats("second")["counts"]
    assert (first["masked"], first["cached"]) == (4, 1)  # the copy is masked once
    assert (second["masked"], second["cached"]) == (0, 5)


def test_the_truncated_image_is_skipped_and_listed(world: World) -> None:
    manifest = world.run()
    assert manifest["samples"] == 5
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 3]
    stats = world.stats()
    assert (stats["items"], stats["skipped"]) == (5, 1)
    [skipped] = stats["skipped_items"]
    assert skipped["item"].endswith("b.jpg")
    assert "truncated" in skipped["reason"]


def test_samples_hold_image_mask_and_origin(world: World) -> None:
    world.run()
    for sample in world.samples().values():
        image = load_image(sample["jpg"])
        decoded = decode_png(sample["mask.png"])
        assert decoded.shape == image.size[::-1]
        assert decoded.dtype == np.uint8
        assert set(np.unique(decoded)) <= {0, 255}
        assert sample["__key__"] == f"{sample['json']['key']}_{sample['json']['label_id']}"
    row = world.rows[2]
    assert world.samples()["c.png"]["json"] == {
        "category": "category 1",
        "label_id": 1,
        "rank": 3,
        "similarity": row.similarity,
        "key": row.key,
        "source": "folder",
        "path": row.path,
        "member": None,
        "sha256": row.sha256,
        "original_width": 48,
        "original_height": 32,
    }


def test_images_are_upright_small_and_passed_through_where_possible(world: World) -> None:
    world.run()
    samples = world.samples()
    assert samples["a.jpg"]["jpg"] == six_files()["a.jpg"]
    assert load_image(samples["e.jpg"]["jpg"]).size == (32, 48)
    assert Image.open(io.BytesIO(samples["e.jpg"]["jpg"])).size == (32, 48)
    assert load_image(samples["f.jpg"]["jpg"]).size == (133, 60)
    assert Image.open(io.BytesIO(samples["c.png"]["jpg"])).format == "JPEG"


def test_masks_are_those_of_the_network_snapped_to_edges(world: World) -> None:
    world.run()
    image = np.array(load_image(six_files()["a.jpg"]))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    coarse = (load_selfmask(world.params.weights).saliency(tensor)[0] > 0.5).numpy()
    assert coarse.any()
    refined = bilateral_solve(image, coarse) > 0.5
    sample = world.samples()["a.jpg"]
    np.testing.assert_array_equal(decode_png(sample["mask.png"]) > 0, refined)
    world.run("coarse", refine=False)
    sample = world.samples("coarse")["a.jpg"]
    np.testing.assert_array_equal(decode_png(sample["mask.png"]) > 0, coarse)


def test_a_larger_k_masks_new_images_only(world: World) -> None:
    every_row = world.rows
    world.rows = every_row[:3]
    world.run("small")
    world.rows = every_row
    world.run("large")
    assert world.stats("large")["counts"]["masked"] == 2


@pytest.mark.parametrize("change", [{"threshold": 0.4}, {"refine": False}, {"short_side": 30}])
def test_changed_settings_do_not_use_old_masks(world: World, change: dict[str, Any]) -> None:
    world.run()
    world.run("changed", **change)
    assert world.stats("changed")["counts"]["masked"] == 4


def test_changed_weights_do_not_use_old_masks(world: World) -> None:
    world.run()
    torch.manual_seed(1)
    model = SelfMask(load_selfmask(world.params.weights).config)
    save_selfmask(model, world.params.weights)
    world.run("changed")
    assert world.stats("changed")["counts"]["masked"] == 4


def test_an_image_in_two_archives_is_masked_once(world: World) -> None:
    first = world.rows[0]
    world.rows = [first, replace(first, label_id=2, category="category 2")]
    assert world.run()["samples"] == 2
    counts = world.stats()["counts"]
    assert (counts["masked"], counts["cached"]) == (1, 1)
    [one, two] = read_shards(world.root / "masks", members=MEMBERS)
    assert one["mask.png"] == two["mask.png"]
    assert one["__key__"] != two["__key__"]


def test_negatives_get_an_empty_mask_without_the_network(world: World) -> None:
    world.rows = [replace(world.rows[0], label_id=0, category="background")]
    world.run()
    [sample] = world.samples().values()
    assert not decode_png(sample["mask.png"]).any()
    counts = world.stats()["counts"]
    assert counts["negatives"] == 1
    assert counts.get("masked", 0) == 0
    assert counts.get("empty_masks", 0) == 0


def test_empty_masks_stay_empty_and_are_counted(world: World) -> None:
    world.run(threshold=1.0)
    assert all(not decode_png(sample["mask.png"]).any() for sample in world.samples().values())
    assert world.stats()["counts"]["empty_masks"] == 5
    (warning,) = world.stats()["warnings"]
    assert warning.startswith("5 of 5 masks are empty")
    assert "mask.source: selfmask" in warning
    world.run(threshold=0.5)
    assert "warnings" not in world.stats()


def test_an_image_that_changed_since_it_was_embedded_is_skipped(world: World) -> None:
    Path(world.rows[0].path).write_bytes(six_files()["f.jpg"])
    world.run()
    reasons = {Path(item["item"]).name: item["reason"] for item in world.stats()["skipped_items"]}
    assert reasons["a.jpg"] == "changed since it was embedded"


def test_very_long_images_are_masked_at_their_own_size(world: World) -> None:
    source = load_mask_source(world.params, world.runtime)
    source.max_pixels = 1000
    image = photo(900, 20, 5)
    [coarse] = coarse_masks([image], source=source)
    assert coarse.shape == refine_mask(image, coarse).shape == (20, 900)


def test_one_pixel_is_an_image_too(world: World) -> None:
    data = file_bytes(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG")
    world.rows = [archive_row(world.root / "images", "dot.png", data, rank=1, label_id=1)]
    world.run()
    assert decode_png(world.samples()["dot.png"]["mask.png"]).shape == (1, 1)


def remove_images(world: World) -> None:
    for row in world.rows:
        Path(row.path).unlink()


def remove_rows(world: World) -> None:
    world.rows = []


def remove_weights(world: World) -> None:
    world.params.weights.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_images, "none of the 6 images can be read; the first, .*a.jpg: file is missing"),
        (remove_rows, "archives.parquet: no images"),
        (remove_weights, "selfmask.safetensors: no such weights file"),
    ],
)
def test_hopeless_input_is_an_error_and_leaves_the_old_output(
    world: World, spoil: Callable[[World], None], message: str
) -> None:
    world.run()
    before = contents(world.root / "masks")
    spoil(world)
    with pytest.raises(PipelineError, match=message):
        world.run()
    assert contents(world.root / "masks") == before


def tiny_spectral(world: World) -> SpectralParams:
    config_path, weights_path = world.root / "clip.json", world.root / "clip.safetensors"
    config_path.write_text(json.dumps(CLIP_CONFIG))
    torch.manual_seed(0)
    state = open_clip.CLIP(**CLIP_CONFIG).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, weights_path)
    encoder = EncoderParams(model=str(config_path), pretrained=str(weights_path))
    return SpectralParams(encoder=encoder, refine=False, short_side=60, batch_size=2, shard_size=3)


def test_spectral_masks_on_a_tiny_clip(world: World) -> None:
    world.params = tiny_spectral(world)
    world.run("first")
    world.run("second")
    assert contents(world.root / "first") == contents(world.root / "second")
    assert world.stats("second")["counts"]["masked"] == 0
    for sample in world.samples("first").values():
        decoded = decode_png(sample["mask.png"])
        assert decoded.shape == load_image(sample["jpg"]).size[::-1]
        assert 0 < decoded.mean() < 255
    for name, changes in (("fewer", {"clusters": [2]}), ("rough", {"precision": "bfloat16"})):
        world.run(name, **changes)
        assert world.stats(name)["counts"]["masked"] == 4
    shapes = [
        {name: decode_png(sample["mask.png"]).shape for name, sample in world.samples(run).items()}
        for run in ("first", "rough")
    ]
    assert shapes[0] == shapes[1]


def test_the_number_of_threads_does_not_show(world: World) -> None:
    world.params = tiny_spectral(world).model_copy(update={"refine": True})
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            world.runtime = replace(world.runtime, cache_dir=world.root / f"cache{threads}")
            world.run(f"with{threads}")
            assert world.stats(f"with{threads}")["counts"]["masked"] == 4
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert contents(world.root / "with1") == contents(world.root / "with3")


def test_the_steps_of_the_solver_are_a_param(world: World) -> None:
    image = np.array(load_image(six_files()["a.jpg"]))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    coarse = (load_selfmask(world.params.weights).saliency(tensor)[0] > 0.5).numpy()
    masks = {}
    for steps in (1, 25):
        world.run(f"steps{steps}", solver_iterations=steps)
        assert world.stats(f"steps{steps}")["counts"]["masked"] == 4
        masks[steps] = decode_png(world.samples(f"steps{steps}")["a.jpg"]["mask.png"]) > 0
        expected = bilateral_solve(image, coarse, max_steps=steps) > 0.5
        np.testing.assert_array_equal(masks[steps], expected)
    assert (masks[1] != masks[25]).any()


def test_the_number_of_workers_does_not_show(world: World) -> None:
    for workers in (0, 3):
        world.runtime = replace(world.runtime, cache_dir=world.root / f"cache{workers}")
        world.run(f"with{workers}", workers=workers)
        assert world.stats(f"with{workers}")["counts"]["masked"] == 4
    assert contents(world.root / "with0") == contents(world.root / "with3")


def test_a_solver_at_half_the_size_makes_masks_of_its_own(world: World) -> None:
    world.run("whole")
    world.run("half", solver_scale=0.5)
    assert world.stats("half")["counts"]["masked"] == 4
    assert world.samples("half")["a.jpg"]["mask.png"] != world.samples("whole")["a.jpg"]["mask.png"]


def numbers(world: World, out: str) -> list[list[int]]:
    """The values of the masks, image by image."""
    samples = world.samples(out).values()
    return [np.unique(decode_png(sample["mask.png"])).tolist() for sample in samples]


def feature_params(world: World, source: str, **changes: Any) -> MaskParams:
    shared = tiny_spectral(world).model_dump(exclude={"source", "clusters", "more_encoders"})
    return MASK_SOURCES[source].params(**{**shared, **changes})


@pytest.mark.parametrize("source", ["cut", "spectral", "found"])
def test_several_objects_are_numbers_in_the_mask(world: World, source: str) -> None:
    world.params = feature_params(world, source, objects=3, tau=0.6, max_cut=1.5)
    manifest = world.run("several")
    assert manifest["mask"]["objects"] == 3
    values = numbers(world, "several")
    assert any(found[-1] in (2, 3) for found in values)
    assert all(found in ([0], [0, 255], [255], [1, 2], [0, 1, 2], [1, 2, 3], [0, 1, 2, 3])
               for found in values)  # fmt: skip
    before = contents(world.root / "several")
    world.run("several")
    assert contents(world.root / "several") == before
    assert world.stats("several")["counts"]["masked"] == 0
    world.run("one", objects=1)
    assert world.stats("one")["counts"]["masked"] == 4
    assert all(found[-1] in (0, 255) for found in numbers(world, "one"))


def test_objects_are_refined_one_by_one(world: World) -> None:
    world.params = feature_params(world, "cut", objects=2, tau=0.6, max_cut=1.5, refine=True)
    world.run("refined")
    world.run("coarse", refine=False)
    sample, coarse = (world.samples(name)["a.jpg"] for name in ("refined", "coarse"))
    objects = decode_objects(coarse["mask.png"])
    assert objects.max() == 2
    image = load_image(sample["jpg"])
    masks = np.stack([refine_mask(image, objects == number) for number in (1, 2)])
    assert sample["mask.png"] == encode_objects(masks)


def test_one_object_is_the_same_file_and_the_same_settings_as_ever(world: World) -> None:
    """`objects` and its thresholds are no settings where nothing is cut."""
    manifest = world.run("plain")
    assert set(manifest["mask"]) == {
        *("version", "source", "weights", "architecture", "threshold", "precision"),
        *("refine", "solver_iterations", "solver_scale", "short_side"),
    }
    world.run("other", tau=0.7, max_cut=0.1, min_area=0.5)
    assert world.stats("other")["counts"]["masked"] == 0
    assert contents(world.root / "plain") == contents(world.root / "other")


def test_a_source_that_learns_does_so_once_for_the_same_images(world: World) -> None:
    world.params = feature_params(world, "found")
    world.run("first")
    learned = world.root / "cache/mask_learner"
    [before] = [path.read_bytes() for path in learned.rglob("*.parquet")]
    world.rows = world.rows[::-1]
    world.run("second", shard_size=2)
    assert [path.read_bytes() for path in learned.rglob("*.parquet")] == [before]
    assert world.stats("second")["counts"]["masked"] == 0
    world.runtime = replace(world.runtime, cache_dir=world.root / "elsewhere")
    world.run("third")
    assert contents(world.root / "third") == contents(world.root / "first")
    world.run("fewer", learn_images=1)
    assert world.stats("fewer")["counts"]["masked"] == 4


def test_what_cannot_be_read_is_no_part_of_what_is_learned(world: World) -> None:
    world.params = feature_params(world, "found")
    gone = world.root / "gone.jpg"
    Path(world.rows[0].path).rename(gone)
    world.run("without", max_error_rate=1.0)
    gone.rename(world.rows[0].path)
    world.run("with", max_error_rate=1.0)
    world.runtime = replace(world.runtime, cache_dir=world.root / "elsewhere")
    world.run("fresh", max_error_rate=1.0)
    assert contents(world.root / "with") == contents(world.root / "fresh")


def test_a_source_that_learns_needs_an_image_to_learn_from(world: World) -> None:
    world.params = feature_params(world, "found")
    remove_images(world)
    with pytest.raises(PipelineError, match=r"found: nothing to tell apart.* 0 images"):
        world.run()


def test_further_encoders_vote_too(world: World) -> None:
    params = tiny_spectral(world)
    state = {
        name: value + 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(4))
        if value.is_floating_point()
        else value
        for name, value in load_file(world.root / "clip.safetensors").items()
    }
    save_file(state, world.root / "other.safetensors")
    other = EncoderParams(
        model=str(world.root / "clip.json"), pretrained=str(world.root / "other.safetensors")
    )
    world.params = params
    alone = world.run("alone")
    together = world.run("together", more_encoders=[other])
    assert "more_encoders" not in alone["mask"]
    assert together["mask"]["encoder"] == alone["mask"]["encoder"]
    assert len(together["mask"]["more_encoders"]) == 1
    assert world.stats("together")["counts"]["masked"] == 4
    pixels = torch.from_numpy(np.array(photo(48, 40, 3))).permute(2, 0, 1)[None].float() / 255
    maps = [FeatureEncoder(params.model_copy(update={"encoder": encoder}), world.runtime)(pixels)[0]
            for encoder in (params.encoder, other)]  # fmt: skip
    source = load_mask_source(params.model_copy(update={"more_encoders": [other]}), world.runtime)
    np.testing.assert_array_equal(source.predict(pixels)[0] > 0, spectral_mask(maps, size=(40, 48)))
    missing = other.model_copy(update={"pretrained": str(world.root / "none.safetensors")})
    with pytest.raises(PipelineError, match=r"mask\.more_encoders\[1\]\.pretrained: .*none"):
        world.run("missing", more_encoders=[other, missing])


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], 0),
        ([(0, 0, 5, 5)], 1),
        ([(0, 0, 5, 5), (5, 5, 4, 4)], 2),  # at their corners only
        ([(0, 0, 20, 20), (30, 30, 2, 2)], 1),  # a speck
        ([(0, 0, 20, 20), (30, 30, 2, 3)], 2),
        ([(0, 2 * n, 1, 1) for n in range(20)], 20),
    ],
)
def test_components_are_connected_by_sides_and_no_specks(
    boxes: list[tuple[int, int, int, int]], expected: int
) -> None:
    image = np.zeros((40, 50), dtype=bool)
    for top, left, height, width in boxes:
        image[top : top + height, left : left + width] = True
    assert mask.num_components(image) == expected


def test_nothing_but_specks_is_that_many_components() -> None:
    image = np.zeros((30, 30), dtype=bool)
    image[::2, ::2] = True
    assert mask.num_components(image) == 225


class Bright:
    """A mask source: what is bright."""

    settings: ClassVar[dict[str, Any]] = {"source": "bright"}
    max_pixels = 10**6
    threshold = 0.45

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(1)


@pytest.fixture
def parted(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Archives of masks in one part, and in the second also in two and three."""
    monkeypatch.setitem(MASK_SOURCES, "selfmask", MaskMethod(SelfMaskParams, lambda *_: Bright()))
    for number in (2, 3):
        image = Image.new("RGB", (60, 40))
        for part in range(number):
            ImageDraw.Draw(image).rectangle((20 * part, 5, 20 * part + 9, 30), fill=(255,) * 3)
        data, name = file_bytes(image, "PNG"), f"parts{number}.png"
        folder = world.root / "images"
        world.rows.append(archive_row(folder, name, data, rank=2 + number, label_id=2))
    return world


def test_images_in_too_many_parts_are_left_out_and_named(parted: World) -> None:
    manifest = parted.run(refine=False)
    stats = parted.stats()
    assert stats["categories"] == {
        "category 1": {"images": 2, "components": 1.0},
        "category 2": {"images": 5, "components": 1.6},
    }
    assert "max_components" not in manifest["mask"]
    assert "many_components" not in stats["counts"]
    for most, left in ((1, 3), (2, 4), (3, 5)):
        manifest = parted.run("fewer", refine=False, max_components=most)
        kept = [json.loads(sample["json"])["path"] for sample in read_shards(parted.root / "fewer")]
        assert len(kept) == 2 + left
        assert manifest["mask"]["max_components"] == most
        stats = parted.stats("fewer")
        assert stats["counts"]["many_components"] == 5 - left
        assert stats["skipped"] == 1  # the damaged image alone
        said = f"mask.max_components: {most} leaves fewer images: category 2 {left} of 5;"
        assert (said in str(stats.get("warnings"))) == (left < 5)
        assert "category 1" not in str(stats.get("warnings"))


def test_without_any_image_in_few_enough_parts_the_field_is_named(parted: World) -> None:
    parted.rows = parted.rows[-2:]
    with pytest.raises(PipelineError, match=r"mask\.max_components: 1 leaves none of 2 images"):
        parted.run("none", refine=False, max_components=1)
    assert not (parted.root / "none").exists()
